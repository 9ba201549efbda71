"""The wheel that users install: everything a command needs is in it."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel without a network and unpack it where nothing else of the project is."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=_ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def _run(installed: Path, empty: Path, *arguments: str, package: str = "msn_eval") -> subprocess.CompletedProcess[str]:
    # First on the path, so before a checkout that is installed in place.
    program = f"import sys; sys.path.insert(0, {str(installed)!r}); from {package}.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)


def test_wheel_contains_the_data_folders_and_the_published_numbers(installed: Path) -> None:
    for pattern in ("configs/**/*", "imagenet_subsets/**/*", "reports/published_results.csv"):
        assert _files(installed / "msn_eval" / "shipped", pattern) == _files(_ROOT, pattern)


def _files(folder: Path, pattern: str) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def test_wheel_contains_the_pages(installed: Path) -> None:
    assets = Path("msn_eval", "reports", "html", "assets")
    inside = _files(installed / assets, "*")

    assert inside == _files(_ROOT / assets, "*")
    assert {"base.html", "page.html", "trajectory.html", "show.html", "theme.js"} <= {path.name for path in inside}


def test_wheel_holds_the_two_packages_and_nothing_else(installed: Path) -> None:
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}

    assert top == {"msn_eval", "msn_pretrain"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("ls", "subsets"),
        ("ls", "checkpoints"),
        ("ls", "probes"),
        ("ls", "datasets"),
        ("ls", "protocols"),
        ("ls", "recipes"),
        ("subsets", "list"),
        ("--config", "low_shot", "--checkpoint", "pixels", "--data", "digits", "--dry-run", "--no-cache"),
    ],
)
def test_installed_command_works_from_an_empty_folder(
    arguments: tuple[str, ...], installed: Path, tmp_path: Path
) -> None:
    done = _run(installed, tmp_path, *arguments)

    assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr


def test_installed_recipes_are_read_by_name_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = _run(installed, tmp_path, "msn_digits", "--dry-run", package="msn_pretrain")

    assert (done.returncode, "images      1,000" in done.stdout) == (0, True), done.stderr


def test_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(installed)!r}); import msn_eval; print(msn_eval.__file__)"

    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert Path(done.stdout.strip()).is_relative_to(installed)
