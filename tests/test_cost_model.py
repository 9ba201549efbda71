"""The cost model: docs/gpu.md has its tables, and `make gpu` measures its terms."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

_BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def model() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(_BENCHMARKS)
        yield importlib.import_module("cost_model")


@pytest.fixture(scope="module")
def terms(model: ModuleType) -> dict[str, object]:
    return dict(model.predict_terms())


def test_document_has_the_tables_of_the_program(model: ModuleType, terms: dict[str, object]) -> None:
    written = model.DOCUMENT.read_text(encoding="utf-8").partition(model.START)[2].partition(model.END)[0]
    assert written == model.make_tables(terms, {})


def test_make_gpu_measures_every_term_that_needs_one_gpu(model: ModuleType, terms: dict[str, object]) -> None:
    parts = importlib.import_module("gpu").list_parts(small=False)
    assert {term for _, measured, _ in parts for term in measured} == terms.keys() - {"all-reduce of 8"}


def test_measured_term_replaces_the_predicted_one(model: ModuleType, terms: dict[str, object]) -> None:
    tables = model.make_tables(terms, {"record": 0.0})
    assert "| record | 0 | s | measured |" in tables
    assert model.make_tables(terms, {}) != tables


def test_overlapping_parts_cost_as_much_as_the_longest(model: ModuleType) -> None:
    parts = dict.fromkeys(("start", "read", "fits", "k-NN", "records"), 1.0) | {
        "decode": 3.0,
        "copy": 2.0,
        "forward": 7.0,
    }
    assert model.low_shot_total(parts) == 12.0
