"""Damaged files never change a number without a word: one random damage per seed. `make corrupt` tries a thousand."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Check = Callable[[int, Path], tuple[str, list[str]]]


@pytest.fixture(scope="module")
def damage_and_check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Check]:
    """Return a function that damages a copy of one scene by a seed, and returns what it did and what was wrong then."""
    sys.path.insert(0, str(Path(__file__).parent))
    corruption = importlib.import_module("corruption")
    scene = corruption.make_scene(tmp_path_factory.mktemp("scene"))
    yield lambda seed, folder: corruption.damage_and_check(scene, seed, folder)
    sys.path.remove(str(Path(__file__).parent))


@pytest.mark.parametrize("seed", range(100))
def test_damaged_file_is_noticed_or_changes_no_number(damage_and_check: Check, seed: int, tmp_path: Path) -> None:
    kind, faults = damage_and_check(seed, tmp_path)

    assert not faults, f"{kind}: {faults}"
