"""Every printed form of a table: its numbers are those of the records, and names stay names."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from msn_eval.reports import FORMATS, render
from msn_eval.reports.terminal import print_table
from msn_eval.result import Result, list_results
from msn_eval.table import make_table

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


def test_csv_numbers_are_the_unrounded_percents(results: list[Result]) -> None:
    table = make_table(results)

    header, line = csv.reader(io.StringIO(render(table, "csv"), newline=""))

    found = [float(value) for title, value in zip(header, line, strict=True) if title.endswith("top1 %")]
    (row,) = table.rows
    assert found == [100 * (table.cells[row, column].mean or 0) for column in table.columns]


def test_json_is_lossless(results: list[Result]) -> None:
    table = make_table(results)

    content = json.loads(render(table, "json"))

    (row,) = table.rows
    assert {name: cell["mean"] for name, cell in content["rows"][0]["cells"].items()} == {
        column.protocol_id: table.cells[row, column].mean for column in table.columns
    }


def test_a_failed_result_is_never_blank_or_zero(results: list[Result]) -> None:
    table = make_table([replace(results[0], status="failed", metrics=None, error="broken")])

    markdown, table_csv, content = (render(table, form) for form in FORMATS)

    (cell,) = json.loads(content)["rows"][0]["cells"].values()
    assert "| pixels | FAILED |" in markdown
    assert ",FAILED," in table_csv
    assert (cell["mean"], cell["status"]) == (None, "failed")


def test_missing_results_show_as_missing(results: list[Result]) -> None:
    one = next(result for result in results if result.probe.name == "logistic")
    other = replace(one, checkpoint=replace(one.checkpoint, name="other", weights_sha256="f" * 64))

    text = render(make_table([*results, other]), "md")

    assert any(line.startswith("| other (pixels) |") and "–" in line for line in text.splitlines()), text


def test_the_terminal_is_not_wrapped_when_piped(results: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    print_table(make_table(_named(results, "n" * 300)))

    assert "n" * 300 in capsys.readouterr().out


def test_the_terminal_prints_no_control_characters_of_a_name(results: list[Result]) -> None:
    written = io.StringIO()

    print_table(make_table(_named(results, "\x1b[31mred")), Console(file=written, width=300))

    assert "\x1b" not in written.getvalue()
