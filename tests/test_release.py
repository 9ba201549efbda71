"""Files of a release: one version everywhere, no placeholder in what is published, and an action that fails as the gate does."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from msn_eval.cli import main
from msn_eval.version import __version__

_ROOT = Path(__file__).parents[1]
_PLACEHOLDER = b"OWNER/msn-eval"  # in reports/ci/regression-gate.yml alone


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Build the wheel and the source distribution, and return the files in them."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(build, cwd=_ROOT, check=True, capture_output=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        files = {f"{wheel.name}:{name}": archive.read(name) for name in archive.namelist()}
    with tarfile.open(source) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        contents = {f"{source.name}:{member.name}": tar.extractfile(member) for member in members}
        files |= {name: file.read() for name, file in contents.items() if file is not None}
    return files


def test_no_published_file_names_a_repository_that_does_not_exist(packages: dict[str, bytes]) -> None:
    named = [
        name for name, content in packages.items() if _PLACEHOLDER in content and not name.endswith("test_release.py")
    ]

    assert named == []


def test_packages_have_the_version_and_the_authors(packages: dict[str, bytes]) -> None:
    (metadata,) = (content.decode() for name, content in packages.items() if name.endswith(".dist-info/METADATA"))

    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nAuthor: The msn-eval contributors\n" in metadata


def test_citation_changelog_and_example_workflow_state_the_version() -> None:
    citation = yaml.safe_load((_ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    example = (_ROOT / "reports" / "ci" / "regression-gate.yml").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[(\d.*)\] - (\S+)$", changelog, re.MULTILINE)[0]

    assert (citation["version"], citation["date-released"]) == newest
    assert newest[0] == __version__
    assert re.findall(r"OWNER/msn-eval@v(\S+)", example) == [__version__]


def _check_step() -> dict[str, Any]:
    action = yaml.safe_load((_ROOT / "action.yml").read_text(encoding="utf-8"))
    (step,) = (step for step in action["runs"]["steps"] if step.get("id") == "check")
    return dict(step)


def test_check_of_the_action_fails_with_the_code_of_the_gate(digits_runs: Path, tmp_path: Path) -> None:
    assert main(["baseline", str(digits_runs), "--out", str(tmp_path / "baseline.json"), "-q"]) == 0
    program = tmp_path / "msn-eval"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m msn_eval "$@"\n')
    program.chmod(0o755)
    (tmp_path / "output").touch()
    inputs = {
        "BASELINE": "baseline.json",
        "CHECKPOINT": "random:demo",
        "DATA": "digits",
        "MARGIN": "0.01",
        "PROGRAM": str(program),
    }
    github = {"RUNNER_TEMP": ".", "GITHUB_OUTPUT": "output", "GITHUB_STEP_SUMMARY": "summary.md"}
    environment = {
        **os.environ,
        **inputs,
        **github,
        "PYTHONPATH": str(_ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", _check_step()["run"]]
    done = subprocess.run(bash, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 10, done.stderr
    assert (tmp_path / "output").read_text() == "exit-code=10\n"
    assert "random:demo" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "msn-eval-junit.xml").is_file()


def test_action_passes_every_input_as_a_variable() -> None:
    action = yaml.safe_load((_ROOT / "action.yml").read_text(encoding="utf-8"))

    scripts = [step["run"] for step in action["runs"]["steps"] if "run" in step]

    assert scripts
    assert [script for script in scripts if "${{" in script] == []
    assert set(_check_step()["env"]) == {
        "PROGRAM",
        *(name.upper() for name in action["inputs"] if name not in ("name", "python-version")),
    }


def test_artifact_of_the_action_has_the_name_that_a_second_use_can_change() -> None:
    action = yaml.safe_load((_ROOT / "action.yml").read_text(encoding="utf-8"))

    (upload,) = (
        step for step in action["runs"]["steps"] if step.get("uses", "").startswith("actions/upload-artifact@")
    )

    assert upload["with"]["name"] == "${{ inputs.name }}"
    assert action["inputs"]["name"]["default"] != ""
