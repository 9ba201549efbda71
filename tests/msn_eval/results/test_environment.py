"""The surroundings that a record states."""

import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import msn_eval
from msn_eval.results import environment
from msn_eval.results.environment import describe_environment
from msn_eval.results.record import EnvironmentFacts

CPU = torch.device("cpu")
Checkout = Callable[[], Path]


def describe() -> EnvironmentFacts:
    return describe_environment(CPU, batch_size=64, seed=3)


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=A Tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def package_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Give a function that makes the package seem to run from a folder, with nothing remembered."""

    def place(folder: Path) -> None:
        monkeypatch.setattr(environment, "__file__", str(folder / "msn_eval" / "results" / "environment.py"))
        environment._commit.cache_clear()

    yield place
    environment._commit.cache_clear()


@pytest.fixture
def checkout(tmp_path: Path, package_in: Callable[[Path], None]) -> Path:
    """Give a git checkout with one commit that the package seems to run from."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "README.md").write_text("one\n")
    git(tmp_path, "add", "README.md")
    git(tmp_path, "commit", "--quiet", "--message", "First")
    package_in(tmp_path)
    return tmp_path


def test_versions_are_those_that_run() -> None:
    facts = describe()
    assert (facts.package, facts.python, facts.torch) == (
        msn_eval.__version__,
        platform.python_version(),
        torch.__version__,
    )


def test_device_batch_and_seed_are_as_given() -> None:
    facts = describe()
    assert (facts.device, facts.batch_size, facts.seed) == ("cpu", 64, 3)


def test_clean_checkout_states_its_commit(checkout: Path) -> None:
    assert describe().git == git(checkout, "rev-parse", "HEAD")


def test_changed_checkout_states_a_plus(checkout: Path) -> None:
    (checkout / "README.md").write_text("two\n")
    assert describe().git == git(checkout, "rev-parse", "HEAD") + "+"


def test_untracked_files_are_no_change(checkout: Path) -> None:
    (checkout / "runs.json").write_text("{}")
    assert describe().git == git(checkout, "rev-parse", "HEAD")


def test_installed_package_states_no_commit(tmp_path: Path, package_in: Callable[[Path], None]) -> None:
    package_in(tmp_path)
    assert describe().git is None


def test_machine_without_git_states_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert describe().git is None


def test_checkout_without_a_commit_states_none(tmp_path: Path, package_in: Callable[[Path], None]) -> None:
    git(tmp_path, "init", "--quiet")
    package_in(tmp_path)
    assert describe().git is None


def test_two_descriptions_are_equal() -> None:
    assert replace(describe(), seed=4) == describe_environment(CPU, batch_size=64, seed=4)
