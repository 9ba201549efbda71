"""A comparison for the terminal, for Markdown and for programs (JSON)."""

import json
from dataclasses import asdict

from msn_eval.errors import printable
from msn_eval.reports.text_tables import markdown_row, markdown_text
from msn_eval.results.comparison import Comparison, Measured, ProtocolComparison
from msn_eval.results.record import CheckpointInfo
from msn_eval.results.statistics import Interval, Paired

_SHOWN = 5


def render_comparison_text(comparison: Comparison) -> str:
    """Give, protocol by protocol, both accuracies, the paired result, a verdict in words, classes and flipped images."""
    lines = [f"first   {_name(comparison.first)}", f"second  {_name(comparison.second)}"]
    for one in comparison.protocols:
        lines += ["", f"{one.title} [{one.protocol_id}], {_draws(one)}", f"  {one.words}"]
        lines += [f"  {name}  {_side(side)}" for name, side in (("first ", one.first), ("second", one.second))]
        lines += [f"  {_paired(one)}", f"  {counts_text(one.paired)}"]
        lines += [f"  {text}" for text in (*_classes(one), *_images(one))]
    lines += [text for title, reason in comparison.left_out for text in ("", f"{title}: not compared: {reason}")]
    lines += ["", _legend()]
    return printable("\n".join(lines)) + "\n"


def render_comparison_markdown(comparison: Comparison) -> str:
    """Give a table with a row a protocol, then what changed most under each."""
    header = ["protocol", "draws", "first", "second", "difference, points", "95 % interval", "p (Holm)", "verdict"]
    rows = [
        [
            one.title,
            str(len(one.draws)),
            _side(one.first),
            _side(one.second),
            points(one.paired.difference),
            interval_text(one.paired.interval),
            p_text(one.p_value),
            one.words,
        ]
        for one in comparison.protocols
    ]
    names = f"First: {_name(comparison.first)}. Second: {_name(comparison.second)}."
    lines = ["### Comparison", "", markdown_text(names), "", markdown_row(header)]
    lines += ["| --- |" + " ---: |" * 6 + " --- |", *map(markdown_row, rows), ""]
    for one in comparison.protocols:
        lines.append(f"- {markdown_text(f'{one.title}: {counts_text(one.paired)}')}")
        lines += [f"  - {markdown_text(text)}" for text in (*_classes(one), *_images(one))]
    lines += [f"- {markdown_text(f'{title}: not compared: {reason}')}" for title, reason in comparison.left_out]
    return "\n".join([*lines, "", markdown_text(_legend())]) + "\n"


def render_comparison_json(comparison: Comparison) -> str:
    """Give all of it, every flipped image and changed class included; accuracies and differences are fractions."""
    return json.dumps(asdict(comparison), indent=1, allow_nan=False) + "\n"


def _name(facts: CheckpointInfo) -> str:
    return f"{facts.name} [{facts.weights_sha256[:8]}]"


def _draws(one: ProtocolComparison) -> str:
    return f"draw{'s' if len(one.draws) > 1 else ''} {', '.join(map(str, one.draws))}"


def _side(side: Measured) -> str:
    spread = "" if side.spread is None else f" ± {100 * side.spread:.2f} over draws"
    return f"{percent(side.accuracy)}{spread}, {100 * side.interval.low:.2f} to {100 * side.interval.high:.2f} over test images"


def _paired(one: ProtocolComparison) -> str:
    interval = f"95 % interval {interval_text(one.paired.interval)}"
    return f"difference {points(one.paired.difference)} points ({interval}; {p_text(one.p_value)})"


def _classes(one: ProtocolComparison) -> list[str]:
    shown = [
        f"class {change.name}: {percent(change.first)} -> {percent(change.second)} of {change.images} images"
        for change in one.classes[:_SHOWN]
    ]
    return [*shown, *([f"… {len(one.classes) - _SHOWN} more classes changed"] if len(one.classes) > _SHOWN else [])]


def _images(one: ProtocolComparison) -> list[str]:
    """Show the first images lost and gained; JSON has all."""
    texts: list[str] = []
    for word, flips in (
        ("lost", [flip for flip in one.flips if flip.second < flip.first]),
        ("gained", [flip for flip in one.flips if flip.second > flip.first]),
    ):
        texts += [
            f"{word}: image {flip.image} (right in {flip.first} -> {flip.second} draws)" for flip in flips[:_SHOWN]
        ]
        texts += [f"… {len(flips) - _SHOWN} more images {word}"] if len(flips) > _SHOWN else []
    return texts


def _legend() -> str:
    return (
        "Draws: sample standard deviation. Test images: 95 % intervals of these fits. p: exact sign-flip test over images, "
        "two-sided, after Holm's correction over the protocols; separable at 5 %."
    )


def percent(accuracy: float) -> str:
    """Give `65.53 %`."""
    return f"{100 * accuracy:.2f} %"


def points(difference: float) -> str:
    """Give a signed difference in points, `-2.03`."""
    return f"{100 * difference:+.2f}"


def p_text(p_value: float) -> str:
    """Give `p = 0.0031`; what a float64 cannot hold is not called zero."""
    return f"p = {p_value:.2g}" if p_value > 0 else "p < 1e-300"


def interval_text(interval: Interval) -> str:
    """Give the ends of a difference's interval, in points."""
    return f"{points(interval.low)} to {points(interval.high)}"


def counts_text(paired: Paired) -> str:
    """Say how many images got worse and better."""
    return f"{paired.lost:,} images lost, {paired.gained:,} gained of {paired.images:,}"
