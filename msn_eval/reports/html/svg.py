"""Curves in SVG units: what the charts of both pages share. The templates of the pages draw them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, kw_only=True)
class Series:
    """Numbers that are drawn as one curve.

    Attributes:
        name: Text of the legend.
        points: (x, y) by increasing x; y is None where the number is not finite.
        stds: Standard deviation of each point, None where there is none. Empty if no point has one.
        texts: Tooltip of each point. Empty if the points are not marked.
    """

    name: str
    points: tuple[tuple[float, float | None], ...]
    stds: tuple[float | None, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a series without gaps: x, mean, minimum and maximum of each point that is drawn."""

    xs: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """A mapping from data to SVG units.

    Attributes:
        x_range: First and last x.
        y_range: Lowest and highest y; numbers outside are drawn at the edge.
        width: Of the complete chart, in SVG units.
        height: Of the complete chart, in SVG units.
        is_log: Whether x is logarithmic.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int
    height: int
    is_log: bool = False
    left: int = 56
    top: int = 14
    right_margin: int = 16
    bottom_margin: int = 50

    @property
    def right(self) -> int:
        return self.width - self.right_margin

    @property
    def bottom(self) -> int:
        return self.height - self.bottom_margin

    def x(self, value: float) -> float:
        low, high = self.x_range
        inset = 0
        if self.is_log:
            low, high, value, inset = math.log(low), math.log(high), math.log(value), 12
        fraction = min(1.0, (value - low) / (high - low))
        return round(self.left + inset + fraction * (self.right - self.left - 2 * inset), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        fraction = (min(high, max(low, value)) - low) / (high - low)
        return round(self.bottom - fraction * (self.bottom - self.top), 1)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in zip(xs, ys, strict=True))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A series as it is drawn.

    Attributes:
        number: Index among the curves of a chart; colours and markers follow from it.
        name: Text of the legend.
        segments: In the units of the data.
        lines: A polyline per segment, in SVG units.
        bands: Polygons between minima and maxima, in SVG units.
        markers: (x, y, tooltip) of the marked points, in SVG units.
    """

    number: int
    name: str
    segments: tuple[Segment, ...]
    lines: tuple[str, ...]
    bands: tuple[str, ...]
    markers: tuple[tuple[float, float, str], ...]


def draw_curve(number: int, series: Series, segments: Sequence[Segment], axes: Axes) -> Curve:
    """Return the curve of a series that was split into `segments`."""
    bands = []
    for segment in segments:
        edges = list(zip(segment.xs, segment.lows, segment.highs, strict=True))
        if series.stds:  # no band where a point has no standard deviation
            edges = [edge for edge in edges if edge[1] < edge[2]]
        if len(edges) > 1:
            xs, lows, highs = zip(*edges, strict=True)
            bands.append(f"{axes.path(xs, highs)} {axes.path(xs[::-1], lows[::-1])}")
    marked = zip(series.points, series.texts, strict=False)
    return Curve(
        number=number,
        name=series.name,
        segments=tuple(segments),
        lines=tuple(axes.path(segment.xs, segment.means) for segment in segments),
        bands=tuple(bands),
        markers=tuple((axes.x(x), axes.y(y), text) for (x, y), text in marked if y is not None),
    )


def split_into_segments(series: Series, bin_width: float = 0.0) -> list[Segment]:
    """Return the parts of a series between its gaps; the points within a bin of x become one, 0 keeps all."""
    stds = series.stds or (None,) * len(series.points)
    rows = [(x, y, std or 0.0) for (x, y), std in zip(series.points, stds, strict=True)]
    parts = [list(part) for is_gap, part in groupby(rows, key=lambda row: row[1] is None) if not is_gap]
    return [_thin([(x, y, std) for x, y, std in part if y is not None], bin_width) for part in parts]


def _thin(rows: Sequence[tuple[float, float, float]], bin_width: float) -> Segment:
    bins = [[row] for row in rows]
    if bin_width:
        bins = [list(group) for _, group in groupby(rows, key=lambda row: int(row[0] / bin_width))]
    return Segment(
        xs=[group[len(group) // 2][0] for group in bins],
        means=[math.fsum(y for _, y, _ in group) / len(group) for group in bins],
        lows=[min(y - std for _, y, std in group) for group in bins],
        highs=[max(y + std for _, y, std in group) for group in bins],
    )


def widen_if_constant(low: float, high: float) -> tuple[float, float]:
    """Return a range that is not empty."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        return low - max(0.5, 0.1 * abs(low)), high + max(0.5, 0.1 * abs(high))
    return low, high


def make_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers that cover a range, at most `most` + 2 of them."""
    smallest_step = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(smallest_step))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= smallest_step * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
