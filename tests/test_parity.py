"""The page that compares with the authors' code: what is missing is skipped in words, and no difference is overlooked."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "parity.py"


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "parity", module)
    spec.loader.exec_module(module)
    return module


def _run(parity: ModuleType, monkeypatch: pytest.MonkeyPatch, page: Path, *differences: float) -> int:
    def compare_toy(folders: Any) -> Iterator[Any]:
        for difference in differences:
            yield parity.Row(what="toy", reference="other", difference=difference, limit=0.5)

    monkeypatch.setattr(parity, "COMPARISONS", ((compare_toy, None), (compare_toy, "msn")))
    monkeypatch.setattr(sys, "argv", ["parity.py", "--out", str(page)])
    monkeypatch.setattr(parity.logging, "disable", lambda level: None)
    return int(parity.main())


@pytest.mark.parametrize(("difference", "code"), [(0.5, 0), (0.6, 1), (float("nan"), 1), (float("inf"), 1)])
def test_a_difference_above_its_limit_is_an_error_and_marked(
    parity: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, difference: float, code: int
) -> None:
    assert _run(parity, monkeypatch, tmp_path / "page.md", 0.0, difference) == code

    page = (tmp_path / "page.md").read_text()
    assert f"2 comparisons, {code} above the limit" in page
    assert page.count("**no**") == code


def test_a_repository_that_is_not_given_is_skipped_in_words(
    parity: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _run(parity, monkeypatch, tmp_path / "page.md", 0.0)

    assert "- toy: skipped, because the repository msn was not given" in (tmp_path / "page.md").read_text()


def test_modules_of_a_repository_are_forgotten(parity: ModuleType, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "utils_of_a_repository.py").write_text(f"name = {name!r}\n")
    found = []
    for name in ("first", "second"):
        with parity.modules_of(tmp_path / name) as load:
            found.append(load("utils_of_a_repository").name)

    assert found == ["first", "second"]
    assert "utils_of_a_repository" not in sys.modules
