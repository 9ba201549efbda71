"""Every printed form of a table: its numbers are those of the records, and names stay names."""

import csv
import io
import json
import re
import statistics
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from msn_eval.reports import FORMATS, render
from msn_eval.reports.terminal import print_table
from msn_eval.results.folder import list_results
from msn_eval.results.record import Result, read_result
from msn_eval.results.statistics import Metrics, wilson_interval
from msn_eval.results.table import Standing, Table, make_table, place_of

_RECORD = Path(__file__).parents[2] / "golden" / "records" / "schema-1" / "b39361b67149d6c5.json"
_HOSTILE = [
    "a|b",
    "`x`",
    "<script>alert(1)</script>",
    "=1+1",
    "@cmd",
    "-2",
    "a\nb",
    "\x1b[31mred",
    "a\u202eb",
    "[x](y)",
    "x" * 300,
]


@pytest.fixture(scope="module")
def results(digits_runs: Path) -> list[Result]:
    return list_results([digits_runs])


def _named(results: list[Result], name: str) -> list[Result]:
    return [replace(result, checkpoint=replace(result.checkpoint, name=name)) for result in results]


def _percents(results: list[Result]) -> set[str]:
    return {f"{100 * cell.mean:.1f}" for cell in make_table(results).cells.values() if cell.mean is not None}


def test_markdown_shows_the_percent_of_every_cell(results: list[Result]) -> None:
    text = render(make_table(results), "md")

    assert {found.group(1) for found in re.finditer(r"(\d+\.\d) ±", text)} == _percents(results)


def test_markdown_says_the_images_a_class_in_every_header(results: list[Result]) -> None:
    table = make_table(results)

    text = render(table, "md")

    assert len(re.findall(r"\d images? a class", text)) == len(table.columns)


@pytest.mark.parametrize("name", _HOSTILE)
def test_a_name_keeps_the_markdown_table_in_shape(results: list[Result], name: str) -> None:
    plain = render(make_table(_named(results, "plain")), "md")

    text = render(make_table(_named(results, name)), "md")

    assert _shape(text) == _shape(plain)
    assert "<script>" not in text


def _shape(text: str) -> list[int]:
    return [len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines()]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(min_size=1, max_size=40))
def test_any_name_survives_csv_in_one_field_that_is_no_formula(results: list[Result], name: str) -> None:
    table = make_table(_named(results, name))

    header, line = csv.reader(io.StringIO(render(table, "csv"), newline=""))

    assert len(line) == len(header)
    assert not line[0].startswith(("=", "+", "-", "@", "\t", "\r"))


def test_csv_numbers_are_the_digits_of_the_records(results: list[Result]) -> None:
    table = make_table(results)

    header, line = csv.reader(io.StringIO(render(table, "csv"), newline=""))

    found = [Decimal(value) / 100 for title, value in zip(header, line, strict=True) if title.endswith("top1 %")]
    (row,) = table.rows
    assert found == [Decimal(repr(table.cells[row, column].mean)) for column in table.columns]


def test_json_is_lossless(results: list[Result]) -> None:
    table = make_table(results)

    content = json.loads(render(table, "json"))

    (row,) = table.rows
    assert {name: cell["mean"] for name, cell in content["rows"][0]["cells"].items()} == {
        column.protocol_id: table.cells[row, column].mean for column in table.columns
    }


def test_a_failed_result_is_never_blank_or_zero(results: list[Result]) -> None:
    table = make_table([replace(results[0], status="failed", metrics=None, error="broken")])

    texts = {form: render(table, form) for form in FORMATS}

    (cell,) = json.loads(texts["json"])["rows"][0]["cells"].values()
    assert "| pixels | FAILED |" in texts["md"]
    assert ",FAILED," in texts["csv"]
    assert "pixels & \\textbf{FAILED} \\\\" in texts["latex"]
    assert (cell["mean"], cell["status"]) == (None, "failed")


def test_a_fit_that_did_not_converge_is_marked_in_every_form(results: list[Result]) -> None:
    table = make_table([replace(results[0], status="not_converged")])

    texts = {form: render(table, form) for form in FORMATS}

    assert "(1)\\*" in texts["md"]
    assert ",not_converged" in texts["csv"]
    assert re.search(r"\d\.\d\* \\\\", texts["latex"])
    assert '"status": "not_converged"' in texts["json"]


def test_missing_results_show_as_missing(results: list[Result]) -> None:
    one = next(result for result in results if result.probe.name == "logistic")
    other = replace(one, checkpoint=replace(one.checkpoint, name="other", weights_sha256="f" * 64))

    text = render(make_table([*results, other]), "md")

    assert any(line.startswith("| other (pixels) |") and "–" in line for line in text.splitlines()), text


_CELL = re.compile(
    r"(?P<mean>\d+\.\d)(?: ± (?P<std>\d+\.\d))?(?: \((?P<draws>\d+)\))?"
    r"(?: \[(?P<low>\d+\.\d), (?P<high>\d+\.\d)\])?(?: rank (?P<rank>\d+))?"
)


def _in_markdown(table: Table) -> list[str]:
    lines = [line for line in render(table, "md").splitlines() if line.startswith("| c")]
    return [cell for line in lines if "checkpoint" not in line for cell in line.strip("| ").split(" | ")[1:]]


def _in_latex(table: Table) -> list[str]:
    body = re.sub(r"\\textbf\{([\d.]+)\}", r"\1", render(table, "latex")).replace("$\\pm$", "±")
    lines = [line.removesuffix(" \\\\").split(" & ")[1:] for line in body.splitlines()]
    marked = [place for place, line in enumerate(body.splitlines()) if re.match(r"c\d+ ", line)]
    asides = [[re.sub(r"\{\\scriptsize (.*)\}", r"\1", aside) for aside in lines[place + 1]] for place in marked]
    return [
        f"{cell} {aside}"
        for place, small in zip(marked, asides, strict=True)
        for cell, aside in zip(lines[place], small, strict=True)
    ]


def _in_terminal(table: Table) -> list[str]:
    written = io.StringIO()
    print_table(table, Console(file=written, width=10_000))
    lines = written.getvalue().splitlines()
    cells = []
    for place, line in enumerate(lines):
        if re.match(r" c\d+ \(pixels\) ", line):
            above, below = (
                [part for part in re.split(r"\s{2,}", one) if part.strip()] for one in lines[place : place + 2]
            )
            cells += [f"{cell.strip()} {aside.strip()}" for cell, aside in zip(above[1:], below, strict=True)]
    return [cell.strip() for cell in cells]


@settings(max_examples=60, deadline=None)
@given(right=st.lists(st.tuples(*[st.integers(0, 797)] * 3), min_size=1, max_size=4, unique=True))
def test_every_number_of_every_form_parses_back_to_its_records(right: list[tuple[int, int, int]]) -> None:
    record = read_result(_RECORD)
    first = [replace(record, split=replace(record.split, draw=draw), id=f"{draw:016x}") for draw in (1, 2, 3)]
    made = [
        replace(
            draw,
            checkpoint=replace(draw.checkpoint, name=f"c{number}", weights_sha256=f"{number:064x}"),
            metrics=Metrics(top1=one / 797, top5=1.0, top1_ci95=wilson_interval(one, 797), n=797),
        )
        for number, counts in enumerate(right)
        for draw, one in zip(first, counts, strict=True)
    ]
    standings = {
        place_of(result): Standing(
            interval=result.metrics and result.metrics.top1_ci95, rank=int(result.checkpoint.name[1:]) + 1
        )
        for result in made
    }
    table = make_table(made, standings=standings)
    expected = []
    for row in table.rows:
        scores = [r.metrics.top1 for r in made if r.checkpoint.name == row.name and r.metrics]
        low, high = next(
            iter(standings[place_of(r)].interval or () for r in made[::-1] if r.checkpoint.name == row.name)
        )
        expected.append((statistics.fmean(scores), statistics.stdev(scores), low, high, 3, int(row.name[1:]) + 1))

    printed = [_CELL.fullmatch(cell) for form in (_in_markdown, _in_latex, _in_terminal) for cell in form(table)]

    assert len(printed) == 3 * len(right)
    for found, (*numbers, draws, rank) in zip(printed, expected * 3, strict=True):
        assert found is not None
        assert [found[name] for name in ("mean", "std", "low", "high")] == [f"{100 * number:.1f}" for number in numbers]
        assert (int(found["draws"]), int(found["rank"])) == (draws, rank)
    for line, numbers in zip([*csv.reader(io.StringIO(render(table, "csv")))][1:], expected, strict=True):
        assert [Decimal(one) for one in line[5:9]] == [Decimal(repr(number)) * 100 for number in numbers[:4]]
        assert line[9:] == [str(numbers[4]), str(numbers[5]), "ok"]
    for row, numbers in zip(json.loads(render(table, "json"))["rows"], expected, strict=True):
        (cell,) = row["cells"].values()
        assert (cell["mean"], cell["std"], *cell["interval95"], cell["draws"], cell["rank"]) == numbers
        assert cell["results"] == [draw.id for draw in first]


def test_the_terminal_is_not_wrapped_when_piped(results: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    print_table(make_table(_named(results, "n" * 300)))

    assert "n" * 300 in capsys.readouterr().out


def test_the_terminal_prints_no_control_characters_of_a_name(results: list[Result]) -> None:
    written = io.StringIO()

    print_table(make_table(_named(results, "\x1b[31mred")), Console(file=written, width=300))

    assert "\x1b" not in written.getvalue()
