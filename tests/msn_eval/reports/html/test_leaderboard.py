"""The page: what stands in it, read back from its HTML; tests/browser opens it in a browser."""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import markupsafe
import pytest

import msn_eval.reports.html.leaderboard
from msn_eval.reports.html.leaderboard import render_html
from msn_eval.results.folder import ResultScan, list_results, scan_results
from msn_eval.results.leaderboard import make_leaderboard
from msn_eval.results.published import published_file, read_published, table_of_published
from msn_eval.results.record import Result
from msn_eval.results.table import make_table

_ROW = re.compile(r'<tr(?: class="pub")?><th scope="row"><bdi>(.*?)</bdi>.*?</th>(.*)')
_CELL = re.compile(
    r'<td class="([^"]*)">(?:<button tabindex="-1">)?(?:<s>(\d+)</s>)?([^<]*)(?:<i> ± ([^<]*)</i>)?(?:<u>(.)</u>)?'
)


@pytest.fixture(scope="module")
def exact() -> ModuleType:
    path = Path(__file__).parents[3] / "exact" / "hostile_pages.py"
    spec = importlib.util.spec_from_file_location("hostile_pages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scan(digits_runs: Path) -> ResultScan:
    return scan_results([digits_runs])


def _made(results: list[Result]) -> str:
    paths = tuple(Path(f"{one.id}.json") for one in results)
    scan = ResultScan(results=tuple(results), paths=paths, faults=())
    return render_html(make_table(results), scan, show_published=False)


def _cells(page: str) -> dict[str, list[tuple[str, ...]]]:
    return {name: _CELL.findall(cells) for name, cells in _ROW.findall(page)}


def test_every_number_is_that_of_its_cell(scan: ResultScan) -> None:
    table = make_table(scan.results, standings=make_leaderboard(scan).standings)

    (shown,) = _cells(render_html(table, scan, show_published=False)).values()

    (row,) = table.rows
    cells = [table.cells[row, column] for column in table.columns]
    assert [(mean, std) for _, _, mean, std, _ in shown] == [
        (f"{100 * cell.mean:.1f}", f"{100 * cell.std:.1f}")
        for cell in cells
        if cell.mean is not None and cell.std is not None
    ]
    assert len(shown) == len(table.columns)


def test_failed_missing_and_unconverged_are_told_apart(digits_runs: Path) -> None:
    first, second, third, *_ = {one.protocol_id: one for one in list_results([digits_runs])}.values()
    other = replace(second.checkpoint, name="other", weights_sha256="f" * 64)
    results = [
        replace(first, status="failed", metrics=None, error="broken"),
        replace(second, checkpoint=other),
        replace(third, status="not_converged"),
    ]

    page = _made(results)

    columns = [column.protocol_id for column in make_table(results).columns]
    place = {one.protocol_id: columns.index(one.protocol_id) for one in results}
    cells = _cells(page)
    assert cells["pixels"][place[first.protocol_id]][2] == "FAILED"
    assert cells["pixels"][place[second.protocol_id]][:3:2] == ("none", "–")
    assert cells["pixels"][place[third.protocol_id]][4] == "*"
    assert cells["other"][place[first.protocol_id]][:3:2] == ("none", "–")


def test_checkpoints_that_share_a_rank_share_a_shade(digits_runs: Path) -> None:
    scan = scan_results([digits_runs])
    one = next(result for result in scan.results if result.probe.name == "logistic")
    same = [r for r in scan.results if r.protocol_id == one.protocol_id]
    results = []
    for number in range(3):
        checkpoint = replace(one.checkpoint, name=f"c{number}", weights_sha256=str(number) * 64)
        for result in same:
            metrics = result.metrics and replace(result.metrics, top1=result.metrics.top1 - number / 20)
            results.append(replace(result, id=f"{number}{result.id[1:]}", checkpoint=checkpoint, metrics=metrics))
    table = make_table(results)
    ranks = {table.rows[0]: 1, table.rows[1]: 1, table.rows[2]: 3}
    cells = {
        (row, column): replace(cell, standing=replace(cell.standing, rank=ranks[row]))
        for (row, column), cell in table.cells.items()
    }
    paths = tuple(Path(f"{result.id}.json") for result in results)

    page = render_html(
        replace(table, cells=cells), ResultScan(results=tuple(results), paths=paths, faults=()), show_published=False
    )

    assert [(looks, rank) for ((looks, rank, *_),) in _cells(page).values()] == [
        ("h8 first", "1"),
        ("h8 first", "1"),
        ("h0", "3"),
    ]


def test_published_rows_are_there_and_hidden_until_they_are_asked_for(scan: ResultScan) -> None:
    table = make_table(scan.results)
    published = table_of_published(read_published(published_file()), table.columns)

    page = render_html(make_table(scan.results, published=published), scan, show_published=False)

    assert page.count('<tr class="pub">') == len(published.rows) > 10
    assert 'class="no-published"' in page
    assert '<input type="checkbox" id="published">' in page
    assert "arXiv:2204.07141 Table 1" in page


def test_published_numbers_of_a_probe_stand_behind_its_measured_ones(scan: ResultScan) -> None:
    table = make_table(scan.results)
    published = table_of_published(read_published(published_file()), table.columns)

    page = render_html(make_table(scan.results, published=published), scan, show_published=False)

    groups = re.findall(r'<th scope="colgroup"[^>]*>([^<]*)</th>', page)
    assert groups[:3] == ["logistic", "logistic, published, imagenet", "knn k=10 T=0.07"]
    chips = dict(re.findall(r'data-group="(\d+)" checked><span>([^<]*)<', page))
    assert all(groups[int(number)] == name for number, name in chips.items())


def test_a_page_without_published_numbers_has_no_switch(scan: ResultScan) -> None:
    assert 'id="published"' not in render_html(make_table(scan.results), scan, show_published=False)


def test_every_column_head_can_be_sorted_and_says_how(scan: ResultScan) -> None:
    table = make_table(scan.results)

    page = render_html(table, scan, show_published=False)

    heads = re.findall(r'<th scope="col"[^>]*aria-sort="(\w+)"><button type="button" data-sort="(-?\d+)">', page)
    assert heads[:2] == [("none", "-1"), ("descending", "0")]
    assert [number for _, number in heads[1:]] == [str(number) for number in range(len(table.columns))]


def test_nothing_but_results_changes_a_page(scan: ResultScan) -> None:
    table = make_table(scan.results)

    pages = {re.sub(r"Made [^<]* UTC", "", render_html(table, scan, show_published=False)) for _ in range(2)}

    assert len(pages) == 1


def test_known_attacks_change_no_page(exact: ModuleType) -> None:
    for attack in exact.names().ATTACKS[::3]:
        exact.check_name(attack)


def test_made_up_names_change_no_page(exact: ModuleType) -> None:
    exact.check_names(25)


def _not_escaping(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = msn_eval.reports.html.page.environment().overlay(autoescape=False)
    monkeypatch.setattr(msn_eval.reports.html.page, "environment", lambda: environment)


def _plain_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msn_eval.reports.html.page, "as_block", lambda value: markupsafe.Markup(json.dumps(value)))


def _unprintable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msn_eval.reports.html.leaderboard, "printable", lambda text: text)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (_not_escaping, "<img src=x onerror=alert(1)>"),
        (_not_escaping, "<!-- x -->"),
        (_plain_json, "</script><script>alert(1)</script>"),
        (_plain_json, "<!--<script>"),
        (_unprintable, "\u202edrow"),
        (_unprintable, "\udc80"),
    ],
)
def test_a_page_that_does_not_escape_would_be_found_out(
    broken: Callable[[pytest.MonkeyPatch], None], name: str, exact: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact.check_name("plain")
    broken(monkeypatch)

    with pytest.raises((AssertionError, UnicodeEncodeError, json.JSONDecodeError)):
        exact.check_name(name)
