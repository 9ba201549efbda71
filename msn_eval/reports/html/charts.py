"""Charts of a table: accuracy over labelled images per class and over k, on a logarithmic axis."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, count, pairwise, repeat, zip_longest

import numpy as np

from msn_eval.reports.html import svg
from msn_eval.reports.text_tables import format_accuracy
from msn_eval.results.data_sets import DataSetAverages
from msn_eval.results.table import Column, Row, Table

_MOST_CURVES = 8
_MOST_RANKED = 24
_MOST_CROSSINGS = 12
_MOST_Y_TICKS = 6
_MIN_TICK_DISTANCE = 0.055  # of the axis; closer texts would overlap
_SUBSET_SIZE = re.compile(r"(\d+)(imgs?|pct)")
Tick = tuple[float, str, str]  # x, its text, and the text below it


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where one series passes another, on straight lines between neighbouring measured points.

    Attributes:
        passed: Index of the series that has the lower accuracy afterwards.
        passing: Index of the other series.
        x: Where they are equal.
        y: Their accuracy there.
        before: The last measured x before it.
        after: The first measured x after it.
    """

    passed: int
    passing: int
    x: float
    y: float
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart in SVG units.

    Attributes:
        rings: (x, y) of the crossings.
        crossings: Their descriptions.
    """

    title: str
    x_title: str
    axes: svg.Axes
    curves: tuple[svg.Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[tuple[float, str], ...]
    rings: tuple[tuple[float, float], ...]
    crossings: tuple[str, ...]


def draw_chart(series: Sequence[svg.Series], *, ticks: Sequence[Tick], title: str, x_title: str) -> Chart:
    """Return the chart of accuracies in percent.

    Args:
        series: At least one, each with at least one point and without gaps.
        ticks: At least two, by increasing x.
        title: Of the chart.
        x_title: Of the x axis.
    """
    segments = [svg.split_into_segments(checkpoint) for checkpoint in series]
    lowest = min(y for (segment,) in segments for y in segment.lows)
    low, high = svg.widen_if_constant(lowest, max(y for (segment,) in segments for y in segment.highs))
    y_ticks = svg.make_ticks(max(0.0, low), min(100.0, high), _MOST_Y_TICKS)
    x_range, y_range = (ticks[0][0], ticks[-1][0]), (y_ticks[0], y_ticks[-1])
    axes = svg.Axes(x_range=x_range, y_range=y_range, width=760, height=400, is_log=True)
    crossings = find_crossings(series)[:_MOST_CROSSINGS]
    return Chart(
        title=title,
        x_title=x_title,
        axes=axes,
        curves=tuple(map(svg.draw_curve, count(), series, segments, repeat(axes))),
        x_ticks=tuple((axes.x(x), text, below) for x, text, below in ticks),
        y_ticks=tuple((axes.y(y), f"{y:g}") for y in y_ticks),
        rings=tuple((axes.x(crossing.x), axes.y(crossing.y)) for crossing in crossings),
        crossings=tuple(
            f"{series[crossing.passing].name} passes {series[crossing.passed].name} at about {crossing.x:.2g} "
            f"(between {crossing.before:.3g} and {crossing.after:.3g})"
            for crossing in crossings
        ),
    )


def find_crossings(series: Sequence[svg.Series]) -> list[Crossing]:
    """Return where one series passes another, by increasing x; between measured points both are straight over log x.

    Series that meet and part again on the same side do not cross; those that meet in a measured point cross there.
    """
    pairs = combinations(range(len(series)), 2)
    crossings = [crossing for i, j in pairs for crossing in _find_crossings_of_pair(series, i, j)]
    return sorted(crossings, key=lambda crossing: (crossing.x, crossing.passing, crossing.passed))


def _find_crossings_of_pair(series: Sequence[svg.Series], i: int, j: int) -> Iterator[Crossing]:
    xs = [[x for x, _ in series[number].points] for number in (i, j)]
    start, end = max(xs[0][0], xs[1][0]), min(xs[0][-1], xs[1][-1])
    shared = sorted({x for x in (*xs[0], *xs[1]) if start <= x <= end})
    leads = [(x, _interpolate(series[i], x) - _interpolate(series[j], x)) for x in shared]
    for (before, lead), (after, next_lead) in pairwise([(x, lead) for x, lead in leads if lead != 0]):
        if (lead > 0) != (next_lead > 0):
            crossing = before * (after / before) ** (lead / (lead - next_lead))
            x = next((x for x in shared if before < x < after), crossing)  # a measured point where both are equal
            passed, passing = (i, j) if lead > 0 else (j, i)
            y = _interpolate(series[i], x)
            yield Crossing(passed=passed, passing=passing, x=x, y=y, before=before, after=after)


def _interpolate(series: svg.Series, x: float) -> float:
    logs, ys = zip(*((math.log(point), y) for point, y in series.points if y is not None), strict=True)
    return float(np.interp(math.log(x), logs, ys))


def draw_shot_charts(table: Table) -> list[Chart]:
    """Return the charts of accuracy over labelled images per class, for measured protocols with more than one subset."""
    charts: defaultdict[str, list[Chart]] = defaultdict(list)
    for (curve, test), columns in _group_by_curve(table):
        ticks = []
        for column in columns:
            text, images = _shorten_subset(column.subset), f"{column.images_per_class:.3g}"
            ticks.append((column.images_per_class, text, "" if text == images else images))
        if not columns[0].published:
            title = "labelled images per class, log scale"
            charts[columns[0].probe] += _draw_columns(
                table, columns, ticks, f"{curve}, scored on {test}" if test else curve, title
            )
    # The first chart of every probe, then the second ones.
    return [chart for row in zip_longest(*charts.values()) for chart in row if chart is not None]


def _group_by_curve(table: Table) -> Iterator[tuple[tuple[str, str], list[Column]]]:
    curves: defaultdict[tuple[str, str], list[Column]] = defaultdict(list)
    for column in table.columns:
        curves[column.curve, column.test].append(column)
    yield from curves.items()


def _shorten_subset(subset: str) -> str:
    if size := _SUBSET_SIZE.fullmatch(subset):
        return f"{size[1]} %" if size[2] == "pct" else size[1]
    return "all" if subset == "full" else subset[:12]


def draw_neighbour_charts(table: Table) -> list[Chart]:
    """Return the charts of accuracy over k, for subsets on which several k were measured, all else equal."""
    groups: defaultdict[tuple[str, object, str, str], list[Column]] = defaultdict(list)
    for column in table.columns:
        if "k" in column.params and not column.published:
            groups[column.subset, column.params["temperature"], column.reason, column.test].append(column)
    charts = []
    for (subset, temperature, reason, test), columns in groups.items():
        texts = (f"knn T={temperature:g} on {reason}", subset, f"scored on {test}" if test else "")
        title = ", ".join(filter(None, texts))
        ticks = [(float(column.params["k"]), f"{column.params['k']:g}", "") for column in columns]
        charts += _draw_columns(table, columns, ticks, title, "neighbours k, log scale")
    return charts


def _draw_columns(
    table: Table, columns: Sequence[Column], ticks: Sequence[Tick], title: str, x_title: str
) -> list[Chart]:
    """Return the chart of the first checkpoints with a number in these columns; none for fewer than two different x."""
    # Of several columns with the same x the first: a curve has one point there.
    by_x = {tick[0]: (column, tick) for column, tick in zip(columns[::-1], ticks[::-1], strict=True)}
    chosen = [by_x[x] for x in sorted(by_x)]
    series = [series for row in table.rows if (series := _read_series(table, row, chosen)).points]
    if len(chosen) < 2 or not series:
        return []
    if len(series) > _MOST_CURVES:
        title += f" (the first {_MOST_CURVES} of {len(series):,} checkpoints)"
    shown_ticks = _drop_overlapping_texts([tick for _, tick in chosen])
    return [draw_chart(series[:_MOST_CURVES], ticks=shown_ticks, title=title, x_title=x_title)]


@dataclass(frozen=True, kw_only=True)
class RankDiagram:
    """Mean ranks on a line, in SVG units, and bars over those that do not differ significantly.

    Attributes:
        ticks: (x, rank) of whole ranks.
        marks: (x, y of the name, whether it stands on the right, text) of each checkpoint.
        ties: (first x, last x, y) of each group.
    """

    axes: svg.Axes
    ticks: tuple[tuple[float, int], ...]
    marks: tuple[tuple[float, float, bool, str], ...]
    ties: tuple[tuple[float, float, float], ...]


def draw_ranks(averages: DataSetAverages) -> RankDiagram | None:
    """Return the critical-difference diagram of a test, None where there was none or there are too many checkpoints.

    Source: Demsar 2006, JMLR 7, figure 1; the bars are those of Holm's correction.
    """
    count = len(averages.rows)
    if averages.p_value is None or count > _MOST_RANKED:
        return None
    half, first_y = (count + 1) // 2, 44 + 7 * len(averages.ties)
    axes = svg.Axes(
        x_range=(1, count), y_range=(0, 1), width=760, height=first_y + 20 * half, left=230, right_margin=230
    )
    xs = [axes.x(row.rank) for row in averages.rows]
    marks = []
    for number, (x, row) in enumerate(zip(xs, averages.rows, strict=True)):
        place = min(number, count - 1 - number)  # the best and the worst first, from both sides
        marks.append((x, first_y + 20.0 * place, number >= half, f"{row.name} {row.rank:.2f}"))
    return RankDiagram(
        axes=axes,
        ticks=tuple((axes.x(rank), rank) for rank in range(1, count + 1)),
        marks=tuple(marks),
        ties=tuple((xs[first], xs[last], 38.0 + 7 * index) for index, (first, last) in enumerate(averages.ties)),
    )


def _drop_overlapping_texts(ticks: list[Tick]) -> list[Tick]:
    """Return the ticks; of two that are close, the smaller one loses its texts."""
    shortest = (ticks[-1][0] / ticks[0][0]) ** _MIN_TICK_DISTANCE
    kept = [(tick[0], "", "") if larger[0] / tick[0] < shortest else tick for tick, larger in pairwise(ticks)]
    return [*kept, ticks[-1]]


def _read_series(table: Table, row: Row, columns: Sequence[tuple[Column, Tick]]) -> svg.Series:
    points, stds, texts = [], [], []
    for column, (x, *_) in columns:
        cell = table.cells.get((row, column))
        if cell is not None and cell.mean is not None:
            points.append((x, 100 * cell.mean))
            stds.append(None if cell.std is None else 100 * cell.std)
            texts.append(f"{row.name}, {column.title}: {format_accuracy(cell)}")
    return svg.Series(name=row.name, points=tuple(points), stds=tuple(stds), texts=tuple(texts))
