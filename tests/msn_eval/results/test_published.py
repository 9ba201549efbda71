"""Published numbers: shown as printed, with their source, and separate from measured ones."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from msn_eval.reports.text_tables import format_cell, format_exact_percent
from msn_eval.results.folder import list_results
from msn_eval.results.published import make_published_table, read_published
from msn_eval.results.record import Result
from msn_eval.results.table import make_table

_RECORDS = Path(__file__).parents[2] / "golden" / "records" / "schema-1"


@pytest.fixture(scope="module")
def numbers() -> pd.DataFrame:
    return read_published()


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return list_results([_RECORDS])


def test_every_number_is_a_percentage_with_a_source(numbers: pd.DataFrame) -> None:
    assert len(numbers) == 705
    assert numbers["percent"].astype(float).between(0, 100).all()
    assert set(numbers["probe"]) == {"logistic", "linear-augmented", "knn", "finetune"}
    assert (numbers["source"] != "").all()
    assert numbers[~numbers["verified"]][["method", "percent"]].to_numpy().tolist() == [["MoCo v3", "78.1"]]


def test_low_shot_numbers_of_the_paper_are_shown_as_printed(numbers: pd.DataFrame, results: list[Result]) -> None:
    table = make_table(results, published=make_published_table(numbers, make_table(results).columns))

    (row,) = (row for row in table.rows if row.name == "MSN ViT-B/16" and row.source == "arXiv:2204.07141 Table 1")
    shown = {column.subset: format_cell(cell) for (one, column), cell in table.cells.items() if one == row}
    assert shown == {"1img": "49.8 ± 0.2", "5imgs": "65.5 ± 0.3"}


def test_every_published_number_is_shown_with_the_digits_of_its_source(
    numbers: pd.DataFrame, results: list[Result]
) -> None:
    published = make_published_table(numbers, make_table(results).columns)

    printed = Counter(
        (row.source, column.probe, column.subset, float(format_exact_percent(cell.mean or 0)))
        for (row, column), cell in published.cells.items()
    )

    is_shown = numbers["probe"].isin(["logistic", "knn", "ncm", "finetune"]) & (numbers["metric"] == "top1")
    shown = numbers[is_shown & numbers["subset"].isin(["1img", "5imgs"])]
    assert printed == Counter(zip(shown.source, shown.probe, shown.subset, shown.percent.astype(float), strict=True))


def test_published_numbers_are_not_ranked_and_have_their_own_columns(
    numbers: pd.DataFrame, results: list[Result]
) -> None:
    table = make_table(results, published=make_published_table(numbers, make_table(results).columns))

    for (row, column), cell in table.cells.items():
        assert bool(row.source) == column.published == (cell.status == "published")
        assert not (column.published and cell.standing.rank)
    for columns in table.groups().values():
        assert len({(column.published, column.probe) for column in columns}) == 1


@pytest.mark.parametrize(
    ("probe", "shown"),
    [
        ("logistic", {"logistic", "finetune"}),
        ("knn", {"knn", "finetune"}),
        ("linear", {"finetune"}),
        ("linear-augmented", {"linear-augmented", "finetune"}),
        ("ridge", {"finetune"}),
        ("ncm", {"finetune"}),
    ],
)
def test_published_numbers_are_shown_only_beside_the_probe_that_reproduces_them(
    numbers: pd.DataFrame, results: list[Result], probe: str, shown: set[str]
) -> None:
    column = make_table(results).columns[0]
    measured = [replace(column, probe=probe, subset=subset) for subset in ("full", "1pct", "5imgs")]

    published = make_published_table(numbers, measured)

    assert {one.probe for one in published.columns} == shown


def test_linear_number_of_the_msn_paper_is_beside_linear_augmented(
    numbers: pd.DataFrame, results: list[Result]
) -> None:
    column = replace(make_table(results).columns[0], probe="linear-augmented", subset="full")

    published = make_published_table(numbers, [column])

    cells = {(row.name, row.source, one.probe): format_cell(cell) for (row, one), cell in published.cells.items()}
    assert cells["MSN ViT-S/16", "arXiv:2204.07141 Table 3", "linear-augmented"] == "76.9"
    assert sum(probe == "linear-augmented" for _, _, probe in cells) > 100


def test_unverified_number_is_marked_in_its_row(numbers: pd.DataFrame, results: list[Result]) -> None:
    doubtful = numbers[numbers["subset"] == "1img"].head(1).assign(verified=False)

    published = make_published_table(doubtful, make_table(results).columns)

    assert "unverified" in published.rows[0].note
    assert any("unverified" in notice for notice in published.notices)
