"""Reports of gate and comparison: hostile names are escaped, and every number is that of the record."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_eval.reports import comparison, gate
from msn_eval.reports.text_tables import markdown_row
from msn_eval.results.baseline import make_baseline
from msn_eval.results.comparison import Comparison, compare
from msn_eval.results.gate import GateReport, check_results
from msn_eval.results.record import Result

RunWriter = Callable[..., list[Result]]
_EVIL = "\x1b[1m<script>|\n## [x](javascript:1)`&lt;\u202e\ud800\ufffe" + "x" * 400


@pytest.fixture(scope="module")
def both(write_run: RunWriter, tmp_path_factory: pytest.TempPathFactory) -> tuple[GateReport, Comparison]:
    """Return a gate report and a comparison of a checkpoint that lost a tenth, with a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    right = np.array([[True] * 700 + [False] * 300])
    before = write_run(folder, right, name="old")
    after = write_run(folder, right & (np.arange(1000) >= 100), weights="b" * 64)
    after = [replace(one, checkpoint=replace(one.checkpoint, name=_EVIL)) for one in after]
    report = check_results(make_baseline(before, [folder]), after, [folder])
    return report, compare(before, after, ([folder], [folder]))


def test_junit_is_well_formed_with_hostile_names(both: tuple[GateReport, Comparison]) -> None:
    named = replace(both[0], protocols=tuple(replace(one, title=_EVIL, reason=_EVIL) for one in both[0].protocols))

    for text in (gate.render_gate_junit(named), gate.render_refusal_junit("error", _EVIL)):
        assert len(list(ElementTree.fromstring(text))) == 1


def test_text_has_no_control_characters_or_direction_marks(both: tuple[GateReport, Comparison]) -> None:
    for text in (gate.render_gate_text(both[0]), comparison.render_comparison_text(both[1])):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)


def test_markdown_escapes_markup_in_names(both: tuple[GateReport, Comparison]) -> None:
    for text in (
        gate.render_gate_markdown(both[0]),
        comparison.render_comparison_markdown(both[1]),
        gate.render_refusal_markdown("error", _EVIL),
    ):
        assert not re.search(r"(?<!\\)[<`\[]", text)
        assert text.encode()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_markdown_row_keeps_the_number_of_cells(cells: list[str]) -> None:
    row = markdown_row(cells)

    assert "\n" not in row
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == len(cells) + 1


def test_numbers_of_the_gate_are_those_of_its_report(both: tuple[GateReport, Comparison]) -> None:
    report = both[0]
    stated = json.loads(gate.render_gate_json(report))["protocols"][0]
    texts = ["70.00 %", "60.00 %", "-10.00", f"{100 * stated['detectable']:.2f}", f"{stated['worse']:.2g}"]

    assert (stated["baseline_accuracy"], stated["accuracy"]) == (0.7, 0.6)
    for text in (gate.render_gate_text(report), gate.render_gate_markdown(report)):
        assert [number for number in texts if number not in text] == []


def test_numbers_of_the_comparison_are_those_of_its_record(both: tuple[GateReport, Comparison]) -> None:
    stated = json.loads(comparison.render_comparison_json(both[1]))["protocols"][0]
    texts = ["70.00 %", "60.00 %", "-10.00", f"{100 * stated['paired']['interval']['low']:+.2f}", "100 images lost"]

    for text in (comparison.render_comparison_text(both[1]), comparison.render_comparison_markdown(both[1])):
        assert [number for number in texts if number not in text] == []


def test_underflowing_p_value_is_not_shown_as_zero() -> None:
    assert (comparison.p_text(0.0), comparison.p_text(0.0312)) == ("p < 1e-300", "p = 0.031")
