"""The user's own source: what changes the address of features that his network gives."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from msn_eval.checkpoints.own_code import own_code_sha256


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the file of a loaded module of the user's."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "helper_of_mine.py"
    file.write_text("scale = 1\n")
    importlib.import_module("helper_of_mine")
    yield file
    del sys.modules["helper_of_mine"]


def test_same_code_has_the_same_hash(own_module: Path) -> None:
    assert own_code_sha256() == own_code_sha256()


def test_changed_module_changes_the_hash(own_module: Path) -> None:
    before = own_code_sha256()
    own_module.write_text("scale = 2\n")
    assert own_code_sha256() != before


def test_module_that_is_loaded_changes_the_hash(own_module: Path) -> None:
    before = own_code_sha256()
    del sys.modules["helper_of_mine"]
    after = own_code_sha256()
    importlib.import_module("helper_of_mine")
    assert after != before


def test_installed_and_own_packages_do_not_count(own_module: Path) -> None:
    before = own_code_sha256()
    importlib.import_module("wave")
    importlib.import_module("omegaconf.resolvers")
    importlib.import_module("msn_eval.commands.ls")
    assert own_code_sha256() == before


@pytest.fixture
def second_module(own_module: Path) -> Iterator[Path]:
    """Give the file of another loaded module of the user's."""
    file = own_module.with_name("another_of_mine.py")
    file.write_text("scale = 3\n")
    importlib.import_module("another_of_mine")
    yield file
    sys.modules.pop("another_of_mine", None)


def test_sources_that_change_places_change_the_hash(own_module: Path, second_module: Path) -> None:
    before = own_code_sha256()
    first, second = own_module.read_text(), second_module.read_text()
    own_module.write_text(second)
    second_module.write_text(first)
    assert own_code_sha256() != before


def test_order_of_imports_does_not_count(own_module: Path, second_module: Path) -> None:
    before = own_code_sha256()
    sys.modules["helper_of_mine"] = sys.modules.pop("helper_of_mine")
    assert own_code_sha256() == before


def test_module_whose_file_is_gone_does_not_count(own_module: Path, second_module: Path) -> None:
    second_module.unlink()
    without_file = own_code_sha256()
    del sys.modules["another_of_mine"]
    assert own_code_sha256() == without_file
