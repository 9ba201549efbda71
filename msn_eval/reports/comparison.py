"""Comparison of two checkpoints as text for the terminal, as Markdown and as JSON."""

import json
from dataclasses import asdict

from msn_eval.errors import format_count, printable
from msn_eval.reports.text_tables import markdown_row, markdown_text
from msn_eval.results.comparison import Comparison, Measured, ProtocolComparison
from msn_eval.results.record import CheckpointInfo, omit_unset
from msn_eval.results.row_names import add_hash, name_networks
from msn_eval.results.statistics import Interval, Paired

_MAX_SHOWN = 5
_HEADER = ("protocol", "draws", "first", "second", "difference, points", "95 % interval", "p (Holm)", "verdict")
_LEGEND = (
    "Draws: sample standard deviation. Test images: 95 % intervals of these fits. p: exact sign-flip test over images, "
    "two-sided, after Holm's correction over the protocols; separable at 5 %."
)


def render_comparison_text(comparison: Comparison) -> str:
    """Render, by protocol, both accuracies, the paired test, a verdict in words, and changed classes and images."""
    first, second = _name_checkpoints(comparison)
    lines = [f"first   {first}", f"second  {second}"]
    for protocol in comparison.protocols:
        draws = f"draw{'s' if len(protocol.draws) > 1 else ''} {', '.join(map(str, protocol.draws))}"
        paired = protocol.paired
        interval = f"95 % interval {interval_text(paired.interval)}; {p_text(protocol.p_value)}"
        lines += ["", f"{protocol.title} [{protocol.protocol_id}], {draws}", f"  {protocol.words}"]
        lines += [f"  first   {_side_text(protocol.first)}", f"  second  {_side_text(protocol.second)}"]
        lines += [f"  difference {points(paired.difference)} points ({interval})", f"  {counts_text(paired)}"]
        lines += [f"  {line}" for line in _list_changes(protocol)]
    for title, reason in comparison.left_out:
        lines += ["", f"{title}: not compared: {reason}"]
    return printable("\n".join([*lines, "", _LEGEND])) + "\n"


def render_comparison_markdown(comparison: Comparison) -> str:
    """Render a table with a row per protocol, then what changed most under each."""
    first, second = _name_checkpoints(comparison)
    names = f"First: {first}. Second: {second}."
    lines = ["### Comparison", "", markdown_text(names), "", markdown_row(_HEADER)]
    lines += ["| --- |" + " ---: |" * 6 + " --- |"]
    items = []
    for protocol in comparison.protocols:
        difference, interval = points(protocol.paired.difference), interval_text(protocol.paired.interval)
        cells = [protocol.title, str(len(protocol.draws)), _side_text(protocol.first), _side_text(protocol.second)]
        cells += [difference, interval, p_text(protocol.p_value), protocol.words]
        lines.append(markdown_row(cells))
        items.append(f"- {markdown_text(f'{protocol.title}: {counts_text(protocol.paired)}')}")
        items += [f"  - {markdown_text(text)}" for text in _list_changes(protocol)]
    items += [f"- {markdown_text(f'{title}: not compared: {reason}')}" for title, reason in comparison.left_out]
    return "\n".join([*lines, "", *items, "", markdown_text(_LEGEND)]) + "\n"


def render_comparison_json(comparison: Comparison) -> str:
    """Render everything, including every changed image and class. Accuracies and differences are fractions."""
    return json.dumps(asdict(comparison, dict_factory=omit_unset), indent=1, allow_nan=False) + "\n"


def _side_text(side: Measured) -> str:
    spread = "" if side.spread is None else f" ± {100 * side.spread:.2f} over draws"
    interval = f"{100 * side.interval.low:.2f} to {100 * side.interval.high:.2f} over test images"
    return f"{percent(side.accuracy)}{spread}, {interval}"


def _list_changes(protocol: ProtocolComparison) -> list[str]:
    """Return the most changed classes, and the first images lost and gained. JSON has all of them."""
    changed: dict[str, list[str]] = {"classes changed": [], "images lost": [], "images gained": []}
    for change in protocol.classes:
        numbers = f"{percent(change.first)} -> {percent(change.second)} of {format_count(change.images, 'image')}"
        changed["classes changed"].append(f"class {change.name}: {numbers}")
    for flip in protocol.flips:
        name = "lost" if flip.second < flip.first else "gained"
        text = f"{name}: image {flip.image} (right in {flip.first} -> {format_count(flip.second, 'draw')})"
        changed[f"images {name}"].append(text)
    lines = []
    for name, texts in changed.items():
        lines += texts[:_MAX_SHOWN]
        lines += [f"… {len(texts) - _MAX_SHOWN} more {name}"] if len(texts) > _MAX_SHOWN else []
    return lines


def _name_checkpoints(comparison: Comparison) -> list[str]:
    """Return the names of both, with the starts of their hashes."""
    both = {"first": comparison.first, "second": comparison.second}
    return [add_hash(name, both[side]) for side, name in name_networks(both).items()]


def checkpoint_text(checkpoint: CheckpointInfo) -> str:
    """Return a checkpoint's name and the start of its hash."""
    return add_hash(name_networks({"only": checkpoint})["only"], checkpoint)


def percent(accuracy: float) -> str:
    """Return an accuracy as `65.53 %`."""
    return f"{100 * accuracy:.2f} %"


def points(difference: float) -> str:
    """Return a signed difference in points, such as `-2.03`."""
    return f"{100 * difference:+.2f}"


def p_text(p_value: float) -> str:
    """Return a p-value as `p = 0.0031`. A float64 underflow is not shown as zero."""
    return f"p = {p_value:.2g}" if p_value > 0 else "p < 1e-300"


def interval_text(interval: Interval) -> str:
    """Return the bounds of a difference's interval, in points."""
    return f"{points(interval.low)} to {points(interval.high)}"


def counts_text(paired: Paired) -> str:
    """Return how many images were lost and gained."""
    return f"{format_count(paired.lost, 'image')} lost, {paired.gained:,} gained of {paired.images:,}"
