"""Charts of a table: accuracy over labelled images per class and over k, on a logarithmic axis."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, count, pairwise, repeat, zip_longest

import numpy as np

from msn_eval.reports.html import svg
from msn_eval.reports.text_tables import format_accuracy
from msn_eval.results.data_sets import DataSetAverages
from msn_eval.results.table import Column, Row, Table

_MOST_CURVES = 8
_MOST_RANKED = 24
_MOST_CROSSINGS = 12
_MOST_Y_TICKS = 6
_MIN_TICK_DISTANCE = 0.09  # of the axis; closer texts would overlap on a phone
_WIDTH, _HEIGHT, _BOTTOM_MARGIN = 560, 344, 66  # SVG units; below the axis are two lines of ticks, and the title
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
class ChartData:
    """What a chart shows.

    Attributes:
        series: At least one, each with at least one point and without gaps.
        ticks: At least two, by increasing x.
    """

    title: str
    x_title: str
    series: tuple[svg.Series, ...]
    ticks: tuple[Tick, ...]


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


@dataclass(frozen=True, kw_only=True)
class ChartRow:
    """Neighbouring charts, of one data set or test set, with the same axes."""

    data: str
    charts: tuple[Chart, ...]

    @property
    def has_bands(self) -> bool:
        return any(curve.bands for chart in self.charts for curve in chart.curves)


def draw_charts(charts: Sequence[ChartData]) -> tuple[Chart, ...]:
    """Return charts of accuracies in percent, with the same axes."""
    segments = [list(map(svg.split_into_segments, chart.series)) for chart in charts]
    parts = [part for chart_segments in segments for (part,) in chart_segments]
    low, high = svg.widen_if_constant(min(min(part.lows) for part in parts), max(max(part.highs) for part in parts))
    y_ticks = svg.make_ticks(max(0.0, low), min(100.0, high), _MOST_Y_TICKS)
    # Of several ticks with the same x the first.
    ticks = sorted({tick[0]: tick for chart in reversed(charts) for tick in chart.ticks}.values())
    x_range, y_range = (ticks[0][0], ticks[-1][0]), (y_ticks[0], y_ticks[-1])
    axes = svg.Axes(
        x_range=x_range, y_range=y_range, width=_WIDTH, height=_HEIGHT, is_log=True, bottom_margin=_BOTTOM_MARGIN
    )
    x_ticks = tuple((axes.x(x), text, below) for x, text, below in _drop_overlapping_texts(ticks))
    y_texts = tuple((axes.y(y), f"{y:g}") for y in y_ticks)
    drawn = []
    for chart, chart_segments in zip(charts, segments, strict=True):
        crossings = find_crossings(chart.series)[:_MOST_CROSSINGS]
        drawn.append(
            Chart(
                title=chart.title,
                x_title=chart.x_title,
                axes=axes,
                curves=tuple(map(svg.draw_curve, count(), chart.series, chart_segments, repeat(axes))),
                x_ticks=x_ticks,
                y_ticks=y_texts,
                rings=tuple((axes.x(crossing.x), axes.y(crossing.y)) for crossing in crossings),
                crossings=tuple(_describe_crossing(crossing, chart.series) for crossing in crossings),
            )
        )
    return tuple(drawn)


def _describe_crossing(crossing: Crossing, series: Sequence[svg.Series]) -> str:
    return (
        f"{series[crossing.passing].name} passes {series[crossing.passed].name} at about {crossing.x:.2g} "
        f"(between {crossing.before:.3g} and {crossing.after:.3g})"
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


def draw_shot_charts(table: Table) -> list[ChartRow]:
    """Return the charts of accuracy over labelled images per class, for measured protocols with more than one subset."""
    charts: defaultdict[str, defaultdict[str, list[ChartData]]] = defaultdict(lambda: defaultdict(list))
    curves: defaultdict[tuple[str, str], list[Column]] = defaultdict(list)
    for column in table.columns:
        if not column.published:
            curves[column.curve, name_data(column)].append(column)
    for (curve, data), columns in curves.items():
        ticks = []
        for column in columns:
            text = _shorten_subset(column.subset)
            ticks.append((column.images_per_class, text, "" if text == column.images else column.images))
        title = "labelled images per class, log scale"
        charts[data][columns[0].probe] += _read_columns(table, columns, ticks, curve, title)
    # The first chart of every probe, then the second ones.
    return _draw_rows(
        {data: list(filter(None, chain(*zip_longest(*probes.values())))) for data, probes in charts.items()}
    )


def name_data(column: Column) -> str:
    """Return the name of the images that a column is scored on: that of the test set, else of the data set."""
    return column.test or column.data


def _draw_rows(charts: Mapping[str, Sequence[ChartData]]) -> list[ChartRow]:
    return [ChartRow(data=data, charts=draw_charts(row)) for data, row in charts.items() if row]


def _shorten_subset(subset: str) -> str:
    if size := _SUBSET_SIZE.fullmatch(subset):
        return f"{size[1]} %" if size[2] == "pct" else size[1]
    return "all" if subset == "full" else subset[:12]


def draw_neighbour_charts(table: Table) -> list[ChartRow]:
    """Return the charts of accuracy over k, for subsets on which several k were measured, all else equal."""
    groups: defaultdict[tuple[str, object, str, str], list[Column]] = defaultdict(list)
    for column in table.columns:
        if "k" in column.params and not column.published:
            groups[column.subset, column.params["temperature"], column.reason, name_data(column)].append(column)
    charts: defaultdict[str, list[ChartData]] = defaultdict(list)
    for (subset, temperature, reason, data), columns in groups.items():
        title = f"knn T={temperature:g} on {reason}, {subset}"
        ticks = [(float(column.params["k"]), f"{column.params['k']:g}", "") for column in columns]
        charts[data] += _read_columns(table, columns, ticks, title, "neighbours k, log scale")
    return _draw_rows(charts)


def _read_columns(
    table: Table, columns: Sequence[Column], ticks: Sequence[Tick], title: str, x_title: str
) -> list[ChartData]:
    """Return a chart of the first checkpoints with a number in these columns; none for fewer than two different x."""
    # Of several columns with the same x the first: a curve has one point there.
    by_x = {tick[0]: (column, tick) for column, tick in zip(columns[::-1], ticks[::-1], strict=True)}
    chosen = [by_x[x] for x in sorted(by_x)]
    series = [series for row in table.rows if (series := _read_series(table, row, chosen)).points]
    if len(chosen) < 2 or not series:
        return []
    if len(series) > _MOST_CURVES:
        title += f" (the first {_MOST_CURVES} of {len(series):,} checkpoints)"
    shown_ticks = tuple(tick for _, tick in chosen)
    return [ChartData(title=title, x_title=x_title, series=tuple(series[:_MOST_CURVES]), ticks=shown_ticks)]


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
