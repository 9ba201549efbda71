"""Published numbers: as printed, with their source, and apart from what was measured."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval.errors import StoreError
from msn_eval.reports.text_tables import cell_text, exact_percent
from msn_eval.results.folder import list_results
from msn_eval.results.published import PublishedNumber, published_file, read_published, table_of_published
from msn_eval.results.record import Result
from msn_eval.results.table import make_table

_RECORDS = Path(__file__).parents[2] / "golden" / "records" / "schema-1"


@pytest.fixture(scope="module")
def numbers() -> tuple[PublishedNumber, ...]:
    return read_published(published_file())


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return list_results([_RECORDS])


def test_every_number_has_a_source_and_one_is_known_to_be_unverified(numbers: tuple[PublishedNumber, ...]) -> None:
    assert len(numbers) == 705
    assert all(one.source for one in numbers)
    assert [(one.method, one.percent) for one in numbers if not one.verified] == [("MoCo v3", "78.1")]


def test_the_paper_s_low_shot_numbers_stand_as_printed(
    numbers: tuple[PublishedNumber, ...], results: list[Result]
) -> None:
    table = make_table(results, published=table_of_published(numbers, make_table(results).columns))

    (row,) = (row for row in table.rows if row.name == "MSN ViT-B/16" and row.source == "arXiv:2204.07141 Table 1")
    shown = {column.subset: cell_text(cell) for (one, column), cell in table.cells.items() if one == row}
    assert shown == {"1img": "49.8 ± 0.2", "5imgs": "65.5 ± 0.3"}


def test_every_published_number_prints_with_the_digits_of_its_source(
    numbers: tuple[PublishedNumber, ...], results: list[Result]
) -> None:
    published = table_of_published(numbers, make_table(results).columns)

    printed = Counter(
        (row.source, column.probe, column.subset, exact_percent(cell.mean or 0))
        for (row, column), cell in published.cells.items()
    )

    subsets, probes = {"1img", "5imgs"}, {"logistic", "knn", "ncm", "finetune"}
    expected = Counter(
        (one.source, one.probe, one.subset, one.percent)
        for one in numbers
        if one.metric == "top1" and one.subset in subsets and one.probe in probes
    )
    assert Counter({(*key[:3], float(key[3])): count for key, count in printed.items()}) == Counter(
        {(*key[:3], float(key[3])): count for key, count in expected.items()}
    )


def test_no_published_number_is_ranked_or_shares_a_column_with_a_measured_one(
    numbers: tuple[PublishedNumber, ...], results: list[Result]
) -> None:
    table = make_table(results, published=table_of_published(numbers, make_table(results).columns))

    for (row, column), cell in table.cells.items():
        assert bool(row.source) == column.published == (cell.status == "published")
        assert not (column.published and cell.standing.rank)
    for columns in table.groups().values():
        assert len({(column.published, column.probe) for column in columns}) == 1


def test_an_unverified_number_is_marked_in_its_row(numbers: tuple[PublishedNumber, ...], results: list[Result]) -> None:
    doubtful = replace(next(one for one in numbers if one.subset == "1img"), verified=False)

    published = table_of_published([doubtful], make_table(results).columns)

    assert "unverified" in published.rows[0].note
    assert any("unverified" in notice for notice in published.notices)


def test_a_source_that_gives_two_numbers_for_one_cell_is_refused(
    numbers: tuple[PublishedNumber, ...], results: list[Result]
) -> None:
    one = next(one for one in numbers if one.subset == "1img")

    with pytest.raises(StoreError, match="gives two numbers"):
        table_of_published([one, replace(one, percent="1.0")], make_table(results).columns)


@pytest.mark.parametrize(
    ("before", "after"), [("40.4", "140.4"), ("40.4", "nan"), ("logreg", "probe"), (",yes", ",perhaps"), ("40.4", "")]
)
def test_a_line_that_is_no_number_is_named(tmp_path: Path, before: str, after: str) -> None:
    header, first, *_ = published_file().read_text().splitlines()
    path = tmp_path / "numbers.csv"
    path.write_text(f"{header}\n{first.replace(before, after)}\n")

    with pytest.raises(StoreError, match="line 2 is no published number"):
        read_published(path)
