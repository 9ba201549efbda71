"""The plug-in of pytest, loaded through its entry point."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch  # noqa: F401 - loaded here, so that the sessions below do not load it each

import msn_eval
from msn_eval.cli import main

_ROOT = Path(__file__).parents[2]
_WORSE = "random:vit_tiny_patch16_224?img_size=32&patch_size=16&depth=1"


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the baseline of raw pixels on the digits."""
    folder = tmp_path_factory.mktemp("baseline")
    msn_eval.evaluate(
        "pixels", data="digits", subsets="1img", probes="ncm", device="cpu", out=folder / "runs", no_cache=True
    )
    assert main(["baseline", str(folder / "runs"), "--out", str(folder / "baseline.json")]) == 0
    return folder / "baseline.json"


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """Return a project in which the package's entry points for pytest are installed."""
    points = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    information = pytester.mkdir("gate_plugin-1.dist-info")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: gate-plugin\nVersion: 1\n")
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (information / "entry_points.txt").write_text(f"[pytest11]\n{lines}")
    pytester.syspathinsert(pytester.path)
    return pytester


def _run(project: pytest.Pytester, call: str) -> pytest.RunResult:
    project.makepyfile(f"def test_not_worse(low_shot_gate):\n    {call}\n")
    return project.runpytest_inprocess()


def test_equal_checkpoint_passes(project: pytest.Pytester, baseline: Path) -> None:
    outcome = _run(project, f"low_shot_gate({str(baseline)!r}, 'pixels', device='cpu', no_cache=True)")

    outcome.assert_outcomes(passed=1)
    assert not (project.path / "runs").exists()


def test_worse_checkpoint_fails_with_the_verdict(project: pytest.Pytester, baseline: Path) -> None:
    outcome = _run(project, f"low_shot_gate({str(baseline)!r}, {_WORSE!r}, device='cpu', no_cache=True)")

    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["REGRESSION: *against the baseline pixels", "*margin 1.00 points*", "*ncm, 1img*"])
    outcome.stdout.no_fnmatch_line("*Traceback*")


def test_margin_is_an_option(project: pytest.Pytester, baseline: Path) -> None:
    outcome = _run(project, f"low_shot_gate({str(baseline)!r}, {_WORSE!r}, margin=0.9, device='cpu', no_cache=True)")

    outcome.assert_outcomes(passed=1)  # a drop of 90 points is excluded


def test_missing_baseline_fails_as_not_comparable(project: pytest.Pytester) -> None:
    outcome = _run(project, "low_shot_gate('missing.json', 'pixels')")

    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["NOT COMPARABLE: missing.json*"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [("margin=2", "*UsageError: margin 2: not a fraction*"), ("devise='cpu'", "*UsageError: *unknown key 'devise'*")],
)
def test_wrong_option_is_an_error(project: pytest.Pytester, baseline: Path, arguments: str, text: str) -> None:
    outcome = _run(project, f"low_shot_gate({str(baseline)!r}, 'pixels', {arguments})")

    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines([text])


def test_plugin_loads_nothing_large() -> None:
    program = "import sys, msn_eval.pytest_plugin; print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=_ROOT, check=True)

    assert {"torch", "numpy", "pandas", "timm", "sklearn"}.isdisjoint(loaded.stdout.split())
