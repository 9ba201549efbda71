"""Verdict of the gate as text for the terminal, as Markdown for a pull request, as JUnit XML and as JSON."""

import json
import re
from dataclasses import asdict
from xml.etree import ElementTree

from msn_eval.errors import format_count, printable
from msn_eval.reports.comparison import checkpoint_text, counts_text, interval_text, p_text, percent, points
from msn_eval.reports.text_tables import markdown_row, markdown_text
from msn_eval.results.gate import GateReport, ProtocolVerdict
from msn_eval.results.record import omit_unset

_SUITE = "msn-eval check"
_NUMBERS = ("baseline", "now", "difference, points", "95 % interval", "p (Holm)", "detectable drop")
_NOT_IN_XML = re.compile("[\ufffe\uffff]")


def render_gate_text(report: GateReport) -> str:
    """Render the verdict and, by protocol, the numbers behind it."""
    lines = [f"{report.verdict.upper()}: {_subject_text(report)}", _rule_text(report)]
    for entry in report.protocols:
        lines += ["", f"{entry.title} [{entry.protocol_id}]", f"  {entry.verdict}: {entry.reason}"]
        lines += [f"  {line}" for line in _list_numbers(entry)]
    if notes := _list_notes(report):
        lines += ["", *notes]
    return printable("\n".join(lines)) + "\n"


def render_gate_markdown(report: GateReport) -> str:
    """Render a heading with the verdict, and a table with a row per protocol."""
    texts = [f"{entry.title}: {entry.verdict}: {entry.reason}" for entry in report.protocols]
    texts += _list_notes(report)
    lines = [
        markdown_text(f"{_subject_text(report)}. {_rule_text(report)}"),
        "",
        markdown_row(["protocol", "verdict", *_NUMBERS]),
    ]
    lines += ["| --- | --- |" + " ---: |" * 6, *(markdown_row(_make_cells(entry)) for entry in report.protocols), ""]
    lines += [f"- {markdown_text(text)}" for text in texts]
    return "\n".join([_heading(report.verdict), "", *lines]) + "\n"


def _heading(verdict: str) -> str:
    return f"### {markdown_text(f'msn-eval check: {verdict}')}"


def render_gate_json(report: GateReport) -> str:
    """Render the complete report. Accuracies, differences and the margin are fractions."""
    return json.dumps(asdict(report, dict_factory=omit_unset), indent=1, allow_nan=False) + "\n"


def render_gate_junit(report: GateReport) -> str:
    """Render a test case per protocol. `not comparable` is an error, every other verdict but `pass` a failure."""
    cases = []
    for entry in report.protocols:
        text = "\n".join([entry.reason, *_list_numbers(entry), *entry.notes])
        cases.append(_make_case(f"{entry.title} [{entry.protocol_id}]", entry.verdict, entry.reason, text))
    return _render_suite(cases)


def render_refusal_junit(verdict: str, reason: str) -> str:
    """Render the single test case, an error, of a check without a verdict on any protocol."""
    return _render_suite([_make_case("check", verdict, reason, "")])


def _make_case(name: str, verdict: str, reason: str, text: str) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=_SUITE, name=_escape_xml(name))
    if verdict == "pass":
        content = ElementTree.SubElement(case, "system-out")
    else:
        tag = "error" if verdict in ("not comparable", "error") else "failure"
        content = ElementTree.SubElement(case, tag, type=verdict, message=_escape_xml(reason))
    content.text = _escape_xml(text) or None
    return case


def _render_suite(cases: list[ElementTree.Element]) -> str:
    counts = {f"{tag}s": str(sum(case.find(tag) is not None for case in cases)) for tag in ("failure", "error")}
    suite = ElementTree.Element("testsuite", {"name": _SUITE, "tests": str(len(cases)), **counts})
    suite.extend(cases)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode") + "\n"


def render_refusal_markdown(verdict: str, reason: str) -> str:
    """Render a heading and the reason why there is no verdict on any protocol."""
    return f"{_heading(verdict)}\n\n{markdown_text(reason)}\n"


def _subject_text(report: GateReport) -> str:
    checkpoint = "no results" if report.checkpoint is None else checkpoint_text(report.checkpoint)
    return f"{checkpoint} against the baseline {report.baseline_name}"


def _rule_text(report: GateReport) -> str:
    return (
        f"rules {report.rules}; margin {100 * report.margin:.2f} points; "
        f"one-sided level {report.level:g} over all protocols together; "
        f"detectable drops at {100 * report.power:g} % power; baseline sha256 {report.baseline_sha256[:16]}"
    )


def _list_notes(report: GateReport) -> list[str]:
    """Return each difference once, with its protocol unless all compared protocols share it."""
    compared = [entry for entry in report.protocols if entry.paired is not None]
    shared = set.intersection(*(set(entry.notes) for entry in compared)) if compared else set()
    notes = [note if note in shared else f"{entry.title}: {note}" for entry in compared for note in entry.notes]
    return [f"differs from the baseline: {note}" for note in dict.fromkeys(notes)]


def _list_numbers(entry: ProtocolVerdict) -> list[str]:
    if entry.paired is None:
        return ["minimal detectable drop: none, nothing was compared"]
    _, _, before, after, difference, interval, p_value, detectable = _make_cells(entry)
    change = "a drop" if entry.paired.difference <= 0 else "a gain"
    return [
        f"{before} -> {after}: {difference} points (95 % interval {interval}; {change}: {p_value} after Holm)",
        f"{counts_text(entry.paired)}, {format_count(entry.paired.draws, 'draw')}",
        f"minimal detectable drop: {detectable} points",
    ]


def _make_cells(entry: ProtocolVerdict) -> list[str]:
    if entry.paired is None:
        return [entry.title, entry.verdict, *["–"] * 6]
    p_value = entry.worse if entry.paired.difference <= 0 else entry.better
    return [
        entry.title,
        entry.verdict,
        percent(entry.baseline_accuracy or 0.0),
        percent(entry.accuracy or 0.0),
        points(entry.paired.difference),
        interval_text(entry.paired.interval),
        p_text(p_value or 0.0),
        f"{100 * (entry.detectable or 0.0):.2f}",
    ]


def _escape_xml(text: str) -> str:
    return _NOT_IN_XML.sub("?", printable(text))
