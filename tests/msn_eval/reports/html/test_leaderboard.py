"""The contents of the page, parsed from its HTML; tests/browser opens it in a browser."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import markupsafe
import pytest

from msn_eval.reports.html import page as page_module
from msn_eval.reports.html.leaderboard import render
from msn_eval.results.folder import ResultScan, scan_results
from msn_eval.results.leaderboard import make_leaderboard
from msn_eval.results.published import make_published_table, read_published
from msn_eval.results.record import Result
from msn_eval.results.table import CellStatistics, Table, get_cell_key, make_table

_ROW = re.compile(r'<tr(?: class="pub")?><th scope="row"><bdi>(.*?)</bdi>.*?</th>(.*)')
_CELL = re.compile(
    r'<td class="([^"]*)">(?:<button tabindex="-1">)?(?:<s>(\d+)</s>)?([^<]*)(?:<i> ± ([^<]*)</i>)?(?:<u>(.)</u>)?'
)


@pytest.fixture
def scan(digits_runs: Path) -> ResultScan:
    return scan_results([digits_runs])


def _scan_of(results: list[Result]) -> ResultScan:
    return ResultScan(results=tuple(results), paths=tuple(Path(f"{result.id}.json") for result in results), faults=())


def _cells(page: str) -> dict[str, list[tuple[str, ...]]]:
    return {name: _CELL.findall(cells) for name, cells in _ROW.findall(page)}


def test_every_number_is_that_of_its_cell(scan: ResultScan) -> None:
    table = make_table(scan.results, standings=make_leaderboard(scan).standings)

    (cells,) = _cells(render(table, scan)).values()

    (row,) = table.rows
    numbers = [(table.cells[row, column].mean, table.cells[row, column].std) for column in table.columns]
    assert [(mean, std) for _, _, mean, std, _ in cells] == [
        (f"{100 * (mean or 0):.1f}", f"{100 * (std or 0):.1f}") for mean, std in numbers
    ]


def test_failed_missing_and_unconverged_are_different(scan: ResultScan) -> None:
    first, second, third, *_ = {result.protocol_id: result for result in scan.results}.values()
    results = [
        replace(first, status="failed", metrics=None, error="broken"),
        replace(second, checkpoint=replace(second.checkpoint, name="other", weights_sha256="f" * 64)),
        replace(third, status="not_converged"),
    ]
    table = make_table(results)

    cells = _cells(render(table, _scan_of(results)))

    protocols = [column.protocol_id for column in table.columns]
    index = [protocols.index(result.protocol_id) for result in results]
    assert cells["pixels"][index[0]][2] == "FAILED"
    assert cells["pixels"][index[1]][:3:2] == ("none", "–")
    assert cells["pixels"][index[2]][4] == "*"
    assert cells["other"][index[0]][:3:2] == ("none", "–")


def test_checkpoints_that_share_a_rank_share_a_shade(scan: ResultScan) -> None:
    logistic = next(result for result in scan.results if result.probe.name == "logistic" and result.metrics)
    results, standings = [], {}
    for number, rank in enumerate((1, 1, 3)):
        checkpoint = replace(logistic.checkpoint, name=f"c{number}", weights_sha256=str(number) * 64)
        metrics = logistic.metrics and replace(logistic.metrics, top1=logistic.metrics.top1 - number / 20)
        results.append(replace(logistic, id=f"{number:016}", checkpoint=checkpoint, metrics=metrics))
        standings[get_cell_key(results[-1])] = CellStatistics(rank=rank)

    cells = _cells(render(make_table(results, standings=standings), _scan_of(results)))

    assert [cell[:2] for (cell,) in cells.values()] == [("h8 first", "1"), ("h8 first", "1"), ("h0", "3")]


def _published(table: Table) -> Table:
    return make_published_table(read_published(), table.columns)


def test_published_rows_are_hidden_until_requested(scan: ResultScan, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(scan.results)
    monkeypatch.setattr("msn_eval.reports.html.leaderboard.is_imagenet", lambda result: True)

    hidden = render(table, scan)
    shown = render(make_table(scan.results, published=_published(table)), scan)

    for page, is_hidden in ((hidden, True), (shown, False)):
        assert page.count('<tr class="pub">') == len(_published(table).rows) > 10
        assert "arXiv:2204.07141 Table 1" in page
        assert ('class="no-published"' in page, '<input type="checkbox" id="published">' in page) == (is_hidden,) * 2


def test_published_numbers_of_a_probe_are_after_its_measured_ones(scan: ResultScan) -> None:
    page = render(make_table(scan.results, published=_published(make_table(scan.results))), scan)

    groups = re.findall(r'<th scope="colgroup"[^>]*><span>([^<]*)</span></th>', page)
    assert groups[:3] == ["logistic on digits", "logistic on imagenet, published", "knn T=0.07 on digits"]
    chips = dict(re.findall(r'data-group="(\d+)" checked><span>([^<]*)<', page))
    assert all(groups[int(number)] == name for number, name in chips.items())


def test_every_column_header_sorts_and_states_the_order(scan: ResultScan) -> None:
    table = make_table(scan.results)

    page = render(table, scan)

    headers = re.findall(r'<th scope="col"[^>]*aria-sort="(\w+)"><button type="button" data-sort="(-?\d+)">', page)
    assert headers[:2] == [("none", "-1"), ("descending", "0")]
    assert [number for _, number in headers[1:]] == [str(number) for number in range(len(table.columns))]


def test_only_results_change_a_page(scan: ResultScan) -> None:
    table = make_table(scan.results)

    pages = {render(table, scan) for _ in range(2)}

    assert len(pages) == 1


def test_known_attacks_and_generated_names_change_no_page(hostile_pages: ModuleType) -> None:
    for attack in hostile_pages.hostile_names.ATTACKS[::3]:
        hostile_pages.check_name(attack)
    hostile_pages.check_names(25)


_UNESCAPED = {
    "build_environment": partial(page_module.build_environment().overlay, autoescape=False),
    "format_json_block": lambda value: markupsafe.Markup(json.dumps(value)),
    "printable": lambda text: text,
}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("build_environment", "<img src=x onerror=alert(1)>"),
        ("build_environment", "<!-- x -->"),
        ("format_json_block", "</script><script>alert(1)</script>"),
        ("format_json_block", "<!--<script>"),
        ("printable", "\u202edrow"),
        ("printable", "\udc80"),
    ],
)
def test_a_page_without_escaping_fails_the_check(
    function: str, name: str, hostile_pages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile_pages.check_name("plain")
    monkeypatch.setattr(page_module, function, _UNESCAPED[function])

    with pytest.raises((AssertionError, UnicodeEncodeError, json.JSONDecodeError)):
        hostile_pages.check_name(name)
