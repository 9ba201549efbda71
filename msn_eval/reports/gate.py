"""The gate's verdict for the terminal, a pull request (Markdown), a build server (JUnit) and programs (JSON)."""

import json
import re
from dataclasses import asdict
from xml.etree import ElementTree

from msn_eval.errors import printable
from msn_eval.reports.comparison import counts_text, interval_text, p_text, percent, points
from msn_eval.reports.text_tables import markdown_row, markdown_text
from msn_eval.results.gate import GateReport, ProtocolVerdict

_SUITE = "msn-eval check"
_NOT_IN_XML = re.compile("[\ufffe\uffff]")


def render_gate_text(report: GateReport) -> str:
    """Give the verdict and, protocol by protocol, what it rests on."""
    lines = [
        f"{report.verdict.upper()}: {_checkpoint(report)} against the baseline {report.baseline_name}",
        _rule(report),
    ]
    for one in report.protocols:
        lines += ["", f"{one.title} [{one.protocol_id}]", f"  {one.verdict}: {one.reason}"]
        lines += [f"  {line}" for line in _numbers(one)]
    lines += ["", *(f"differs from the baseline: {note}" for note in _notes(report))] if _notes(report) else []
    return printable("\n".join(lines)) + "\n"


def render_gate_markdown(report: GateReport) -> str:
    """Give a heading with the verdict, and a table with a row a protocol."""
    rows = [
        [
            "protocol",
            "verdict",
            "baseline",
            "now",
            "difference, points",
            "95 % interval",
            "p (Holm)",
            "detectable drop",
        ],
        *(_row(one) for one in report.protocols),
    ]
    table = [markdown_row(rows[0]), "| --- | --- |" + " ---: |" * 6, *map(markdown_row, rows[1:])]
    reasons = [f"- {markdown_text(f'{one.title}: {one.verdict}: {one.reason}')}" for one in report.protocols]
    reasons += [f"- {markdown_text(f'differs from the baseline: {note}')}" for note in _notes(report)]
    heading = f"### {markdown_text(f'msn-eval check: {report.verdict}')}"
    about = markdown_text(f"{_checkpoint(report)} against the baseline {report.baseline_name}. {_rule(report)}")
    return "\n".join([heading, "", about, "", *table, "", *reasons]) + "\n"


def render_gate_json(report: GateReport) -> str:
    """Give the whole report; accuracies, differences and the margin are fractions."""
    return json.dumps(asdict(report), indent=1, allow_nan=False) + "\n"


def render_gate_junit(report: GateReport) -> str:
    """Give a test case a protocol: a regression and whatever is inconclusive fails, what is not comparable is an error."""
    failed = [one for one in report.protocols if one.verdict not in ("pass", "not comparable")]
    broken = [one for one in report.protocols if one.verdict == "not comparable"]
    counts = {"tests": len(report.protocols), "failures": len(failed), "errors": len(broken)}
    suite = ElementTree.Element("testsuite", {"name": _SUITE, **{name: str(count) for name, count in counts.items()}})
    for one in report.protocols:
        case = ElementTree.SubElement(
            suite, "testcase", classname=_SUITE, name=_xml(f"{one.title} [{one.protocol_id}]")
        )
        text = _xml("\n".join([one.reason, *_numbers(one), *one.notes]))
        if one.verdict == "pass":
            ElementTree.SubElement(case, "system-out").text = text
        else:
            kind = "error" if one.verdict == "not comparable" else "failure"
            ElementTree.SubElement(case, kind, type=one.verdict, message=_xml(one.reason)).text = text
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=False) + "\n"


def render_refusal_junit(reason: str) -> str:
    """Give the single erroneous test case of a check that had no baseline, or no results."""
    suite = ElementTree.Element("testsuite", name=_SUITE, tests="1", failures="0", errors="1")
    case = ElementTree.SubElement(suite, "testcase", classname=_SUITE, name="baseline")
    ElementTree.SubElement(case, "error", type="not comparable", message=_xml(reason))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode") + "\n"


def render_refusal_markdown(reason: str) -> str:
    """Say in a heading and a sentence that nothing could be compared."""
    return f"### {markdown_text('msn-eval check: not comparable')}\n\n{markdown_text(reason)}\n"


def _checkpoint(report: GateReport) -> str:
    facts = report.checkpoint
    return "no results" if facts is None else f"{facts.name} [{facts.weights_sha256[:8]}]"


def _notes(report: GateReport) -> list[str]:
    """Give each difference once, and the protocol where it is not that of all compared ones."""
    compared = [one for one in report.protocols if one.paired is not None]
    texts: dict[str, None] = {}
    for one in compared:
        for note in one.notes:
            shared = all(note in other.notes for other in compared)
            texts[note if shared else f"{one.title}: {note}"] = None
    return list(texts)


def _rule(report: GateReport) -> str:
    return (
        f"margin {100 * report.margin:.2f} points; one-sided level {report.level:g} over all protocols together; "
        f"detectable drops at {100 * report.power:g} % power; baseline sha256 {report.baseline_sha256[:16]}"
    )


def _numbers(one: ProtocolVerdict) -> list[str]:
    paired = one.paired
    if paired is None or one.accuracy is None or one.baseline_accuracy is None:
        return ["minimal detectable drop: none, nothing was compared"]
    worse, better, detectable = one.worse or 0.0, one.better or 0.0, one.detectable or 0.0
    smaller = ("a drop", worse) if paired.difference <= 0 else ("a gain", better)
    return [
        f"{percent(one.baseline_accuracy)} -> {percent(one.accuracy)}: {points(paired.difference)} points "
        f"(95 % interval {interval_text(paired.interval)}; {smaller[0]}: {p_text(smaller[1])} after Holm)",
        f"{counts_text(paired)}, {paired.draws} draw{'s' if paired.draws > 1 else ''}",
        f"minimal detectable drop: {100 * detectable:.2f} points",
    ]


def _row(one: ProtocolVerdict) -> list[str]:
    if one.paired is None or one.accuracy is None or one.baseline_accuracy is None:
        return [one.title, one.verdict, "–", "–", "–", "–", "–", "–"]
    p_value = one.worse if one.paired.difference <= 0 else one.better
    return [
        one.title,
        one.verdict,
        percent(one.baseline_accuracy),
        percent(one.accuracy),
        points(one.paired.difference),
        interval_text(one.paired.interval),
        p_text(p_value or 0.0),
        f"{100 * (one.detectable or 0.0):.2f}",
    ]


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub("?", printable(text))
