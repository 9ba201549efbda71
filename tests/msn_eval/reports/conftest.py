"""Records with hostile names, and the scripts of tests/exact that check thousands of them."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

_EXACT = str(Path(__file__).parents[2] / "exact")


@pytest.fixture(scope="session")
def hostile_pages() -> Iterator[ModuleType]:
    """Return the script that checks pages; its `hostile_names` is the one that checks all other formats."""
    sys.path.insert(0, _EXACT)
    yield importlib.import_module("hostile_pages")
    sys.path.remove(_EXACT)
