"""Charts: lines of accuracies over a logarithmic axis, laid out here and drawn as SVG by the page's template."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from msn_eval.errors import printable
from msn_eval.results.table import Cell, Column, Row, Table

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


MOST_LINES = 8
_MOST_CROSSINGS = 12
_SUBSET_TEXTS = {"1img": "1", "2imgs": "2", "5imgs": "5", "1pct": "1 %", "10pct": "10 %", "full": "all"}


def shot_charts(table: Table) -> list[Chart]:
    """Give a chart for each group of measured columns that has more than one subset: accuracy over images a class."""
    found: list[tuple[str, Chart]] = []
    for group, columns in table.groups().items():
        chosen = _one_a_place([column for column in columns if not column.published], lambda one: one.images_per_class)
        if len(chosen) > 1:
            ticks = _apart([(one.images_per_class, *_tick_texts(one)) for one in chosen])
            x_title = "labelled images a class, log scale"
            charts = _chart(table, chosen, lambda one: one.images_per_class, ticks, title=group, x_title=x_title)
            found += [(chosen[0].probe, chart) for chart in charts]
    seen: Counter[str] = Counter()
    places = []
    for probe, _ in found:
        places.append(seen[probe])
        seen[probe] += 1
    # Each probe once before any of them twice.
    return [found[number][1] for number in sorted(range(len(found)), key=places.__getitem__)]


def neighbour_charts(table: Table) -> list[Chart]:
    """Give a chart for each subset on which several k were measured, all else equal: accuracy over k."""
    alike: defaultdict[tuple[object, ...], list[Column]] = defaultdict(list)
    for column in table.columns:
        if "k" in column.params and not column.published:
            alike[column.subset, column.params["temperature"], column.reason].append(column)
    charts: list[Chart] = []
    for (subset, temperature, reason), columns in alike.items():
        chosen = _one_a_place(columns, _neighbours)
        if len(chosen) > 1:
            title = ", ".join(str(part) for part in (f"knn T={temperature:g}", subset, reason) if part)
            ticks = _apart([(_neighbours(one), f"{_neighbours(one):g}", "") for one in chosen])
            charts += _chart(table, chosen, _neighbours, ticks, title=title, x_title="neighbours k, log scale")
    return charts


def _neighbours(column: Column) -> float:
    return float(column.params["k"])


def _tick_texts(column: Column) -> tuple[str, str]:
    text = _SUBSET_TEXTS.get(column.subset, printable(column.subset)[:12])
    images = f"{column.images_per_class:.3g}"
    return (text, "" if text == images else images)


def _one_a_place(columns: Sequence[Column], place: Callable[[Column], float]) -> list[Column]:
    """Give columns in rising order; of several at one place the first, since a line has one point there."""
    return sorted({place(column): column for column in reversed(columns)}.values(), key=place)


def _apart(ticks: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Keep the texts of neighbouring ticks from covering each other: the smaller of two close ones loses its own."""
    span = max(tick[0] for tick in ticks) / min(tick[0] for tick in ticks)
    kept: list[tuple[float, str, str]] = []
    for x, text, below in reversed(ticks):
        close = bool(kept) and (kept[-1][0] / x) < span**0.055
        kept.append((x, "" if close else text, "" if close else below))
    return kept[::-1]


def _chart(
    table: Table,
    columns: Sequence[Column],
    place: Callable[[Column], float],
    ticks: list[tuple[float, str, str]],
    *,
    title: str,
    x_title: str,
) -> list[Chart]:
    """Give the chart of the first checkpoints that have a number in one of the columns, or none where nothing has."""
    names = [row for row in table.rows if any(_is_number(table.cells.get((row, column))) for column in columns)]
    lines = [_line(table, row, columns, place) for row in names[:MOST_LINES]]
    if not lines:
        return []
    more = f" (the first {MOST_LINES} of {len(names):,} checkpoints)" if len(names) > MOST_LINES else ""
    title = f"{printable(title)}{more}"
    return [draw_chart(lines, ticks=ticks, title=title, x_title=x_title, most_crossings=_MOST_CROSSINGS)]


def _is_number(cell: Cell | None) -> bool:
    return cell is not None and cell.mean is not None


def _line(table: Table, row: Row, columns: Sequence[Column], place: Callable[[Column], float]) -> Line:
    name, points = printable(row.name), []
    for column in columns:
        cell = table.cells.get((row, column))
        if cell is not None and cell.mean is not None:
            std = None if cell.std is None else 100 * cell.std
            text = f"{name}, {printable(column.title)}: {100 * cell.mean:.1f}" + (
                "" if std is None else f" ± {std:.1f}"
            )
            points.append(Point(x=place(column), mean=100 * cell.mean, std=std, text=text))
    return Line(name=name, points=tuple(points))
