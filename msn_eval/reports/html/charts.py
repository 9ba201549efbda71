"""Charts: lines of accuracies over a logarithmic axis, laid out here and drawn as SVG by the page's template."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 760, 400  # of a whole chart, in SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 186, 14, 52
_LABEL_CHARACTERS = 20
_LABEL_STEP = 17.0
_MOST_Y_TICKS = 6
_MARKS = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured accuracy. x: above 0; mean, std: in percent, std None where there is no spread."""

    x: float
    mean: float
    std: float | None
    text: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """The accuracies of one checkpoint, in rising x."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where the second line passes the first, on a straight line between two neighbouring measured points."""

    passed: int
    passing: int
    x: float
    y: float
    after: float
    before: float


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point on paper."""

    x: float
    y: float
    mark: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A line on paper: its polyline, the band of its spread (empty where there is none), its dots, and its shortened name."""

    number: int
    name: str
    label: str
    path: str
    band: str
    dots: tuple[Dot, ...]
    label_y: float
    end_y: float
    end_x: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Everything that the template draws, in SVG units."""

    title: str
    x_title: str
    lines: tuple[Drawn, ...]
    x_ticks: tuple[tuple[float, str, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    rings: tuple[tuple[float, float], ...]
    crossings: tuple[str, ...]
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT


def draw_chart(
    lines: Sequence[Line], *, ticks: Sequence[tuple[float, str, str]], title: str, x_title: str, most_crossings: int
) -> Chart:
    """Lay out a chart.

    lines: at least one, each with at least one point
    ticks: x values with a text and what stands below it
    """
    xs = [tick for tick, _, _ in ticks]
    low, high = _range([(p.mean - (p.std or 0), p.mean + (p.std or 0)) for line in lines for p in line.points])
    first, last = math.log(min(xs)), math.log(max(xs))

    def across(x: float) -> float:
        share = (math.log(x) - first) / (last - first) if last > first else 0.5
        return round(_LEFT + 12 + share * (WIDTH - _LEFT - _RIGHT - 24), 1)

    def down(y: float) -> float:
        return round(HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 1)

    labels = _spread_out([down(line.points[-1].mean) for line in lines], low=_TOP + 4, high=HEIGHT - _BOTTOM)
    crossings = find_crossings(lines)[:most_crossings]
    return Chart(
        title=title,
        x_title=x_title,
        lines=tuple(
            Drawn(
                number=number,
                name=line.name,
                label=_shortened(line.name),
                path=" ".join(f"{across(p.x)},{down(p.mean)}" for p in line.points),
                band=_band([(across(p.x), down(p.mean + p.std), down(p.mean - p.std)) for p in line.points if p.std]),
                dots=tuple(
                    Dot(x=across(p.x), y=down(p.mean), mark=_MARKS[number % len(_MARKS)], text=p.text)
                    for p in line.points
                ),
                label_y=labels[number],
                end_x=across(line.points[-1].x),
                end_y=down(line.points[-1].mean),
            )
            for number, line in enumerate(lines)
        ),
        x_ticks=tuple((across(x), text, below) for x, text, below in ticks),
        y_ticks=tuple((down(y), f"{y:g}") for y in _y_ticks(low, high)),
        rings=tuple((across(one.x), down(one.y)) for one in crossings),
        crossings=tuple(
            f"{lines[one.passing].name} passes {lines[one.passed].name} at about {one.x:.2g} "
            f"(between {one.before:.3g} and {one.after:.3g})"
            for one in crossings
        ),
    )


def find_crossings(lines: Sequence[Line]) -> list[Crossing]:
    """Give where one line passes another, in rising x; between measured points both are taken to be straight over log x.

    Lines that meet and part again on the same side do not cross; those that meet in a measured point cross there.
    """
    found = []
    for a, first in enumerate(lines):
        for b in range(a + 1, len(lines)):
            found += _crossings(a, b, first, lines[b])
    return sorted(found, key=lambda one: (one.x, one.passing, one.passed))


def _crossings(a: int, b: int, first: Line, second: Line) -> list[Crossing]:
    start = max(first.points[0].x, second.points[0].x)
    end = min(first.points[-1].x, second.points[-1].x)
    xs = sorted({point.x for line in (first, second) for point in line.points if start <= point.x <= end})
    leads = [(x, _height(first, x) - _height(second, x)) for x in xs]
    found, last = [], None  # the last measured x where one of them led
    for x, lead in leads:
        if lead == 0:
            continue
        if last is not None and (last[1] > 0) != (lead > 0):
            met = next((between for between, gap in leads if last[0] < between < x and gap == 0), None)
            share = last[1] / (last[1] - lead)
            at = met or math.exp(math.log(last[0]) + share * (math.log(x) - math.log(last[0])))
            passed, passing = (a, b) if last[1] > 0 else (b, a)
            found.append(Crossing(passed=passed, passing=passing, x=at, y=_height(first, at), before=last[0], after=x))
        last = x, lead
    return found


def _height(line: Line, x: float) -> float:
    """Give the accuracy of a line at an x within it, straight over log x between its points."""
    for before, after in pairwise(line.points):
        if before.x <= x <= after.x:
            share = (math.log(x) - math.log(before.x)) / (math.log(after.x) - math.log(before.x))
            return (
                before.mean
                if share == 0
                else after.mean
                if share == 1
                else (1 - share) * before.mean + share * after.mean
            )
    return line.points[0].mean


def _shortened(name: str) -> str:
    """Give a name with its middle left out where it is long: names of one family differ at their ends."""
    if len(name) <= _LABEL_CHARACTERS:
        return name
    half = (_LABEL_CHARACTERS - 1) // 2
    return f"{name[: _LABEL_CHARACTERS - 1 - half]}…{name[-half:]}"


def _range(spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Give the span of the y axis in percent, whole ticks around everything drawn."""
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    step = _step(high - low)
    low, high = max(0.0, math.floor(low / step) * step), min(100.0, math.ceil(high / step) * step)
    return (low, high) if high > low else (max(0.0, high - step), max(step, high))


def _y_ticks(low: float, high: float) -> list[float]:
    step = _step(high - low)
    return [round(low + number * step, 6) for number in range(round((high - low) / step) + 1)]


def _step(span: float) -> float:
    return next((step for step in (1.0, 2.0, 5.0, 10.0, 20.0) if span / step <= _MOST_Y_TICKS), 20.0)


def _band(edges: Sequence[tuple[float, float, float]]) -> str:
    """Give the polygon between upper and lower edge of neighbouring points, or nothing for fewer than two."""
    if len(edges) < 2:
        return ""
    return " ".join([*(f"{x},{top}" for x, top, _ in edges), *(f"{x},{bottom}" for x, _, bottom in reversed(edges))])


def _spread_out(wanted: Sequence[float], *, low: float, high: float) -> list[float]:
    """Move labels apart, keeping their order, so that none covers another; in the end upwards, where the room ends."""
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    placed = [0.0] * len(wanted)
    lowest = low
    for place in order:
        placed[place] = max(wanted[place], lowest)
        lowest = placed[place] + _LABEL_STEP
    highest = high
    for place in reversed(order):
        placed[place] = round(min(placed[place], highest), 1)
        highest = placed[place] - _LABEL_STEP
    return placed
