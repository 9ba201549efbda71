"""The list of faults is complete, and commands that meet a fault end as it says. `make faults` tries all of it."""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]


def _load(name: str) -> ModuleType:
    sys.path.insert(0, str(_HERE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(_HERE))


_FAULTS = _load("fault_list").read_faults()
_TRIALS = [
    pytest.param(trial, id=f"{fault.id}-{trial.make}") for fault in _FAULTS for trial in fault.trials if trial.suite
]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that injections start from."""
    folder = tmp_path_factory.mktemp("scene")
    _load("injections").fill_scene(folder)
    return folder


def test_every_table_is_listed_without_a_gap_or_a_repetition() -> None:
    sizes = {"A": 18, "B": 8, "C": 8, "D": 6, "E": 12, "F": 10, "G": 7, "H": 7, "I": 8, "J": 10, "K": 12, "L": 20}

    assert [fault.id for fault in _FAULTS] == [f"{t}{n}" for t, size in sizes.items() for n in range(1, size + 1)]


def test_every_row_has_a_test_or_a_reason() -> None:
    assert [fault.id for fault in _FAULTS if not (fault.test or fault.trials or fault.not_tried)] == []


def test_every_named_test_exists() -> None:
    nodes = {node for fault in _FAULTS for node in fault.test}
    files = {node.partition("::")[0] for node in nodes}

    assert sorted(nodes - {f"{file}::{name}" for file in files for name in _tests(file)}) == []


def _tests(file: str) -> list[str]:
    path = _ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def test_every_injection_is_used() -> None:
    tree = ast.parse((_HERE / "injections.py").read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}

    assert functions - {"fill_scene"} == {trial.make for fault in _FAULTS for trial in fault.trials}


@pytest.mark.parametrize("trial", _TRIALS)
def test_a_command_that_meets_a_fault_ends_as_listed(trial: Any, scene: Path, tmp_path: Path) -> None:
    assert _load("fault_list").run_trial(trial, scene, tmp_path / "work") == []


def test_a_trial_notices_every_difference(scene: Path, tmp_path: Path) -> None:
    fault_list = _load("fault_list")
    shell = "rm vit.safetensors; echo x > baseline.json; touch new; echo Traceback >&2; exit 3; {command}"
    trial = fault_list.Trial(make="no_fault", command=["ls"], shell=shell, exit=2, stderr=["bad.pth"], stdout=["PASS"])

    wrong = "\n".join(fault_list.run_trial(trial, scene, tmp_path / "work"))

    for text in (
        "exit code 3, not 2",
        "stderr lacks 'bad.pth'",
        "stdout lacks 'PASS'",
        "traceback",
        "vit.safetensors is lost or changed",
        "baseline.json is lost or changed",
        "new is new",
    ):
        assert text in wrong


def test_no_module_uses_a_database() -> None:
    files = [path for package in ("msn_eval", "msn_pretrain") for path in (_ROOT / package).rglob("*.py")]
    modules = {
        name.partition(".")[0]
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }

    assert "torch" in modules
    assert not modules & {"sqlite3", "dbm", "shelve", "lmdb"}
