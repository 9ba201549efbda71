"""Panels: numbers over the steps of a run, drawn as SVG by the page's template and as PNG by matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, repeat

from msn_eval.reports.html import svg

_SIZE, _TALL_SIZE = (600, 250), (820, 270)  # SVG units
_LEVEL_MARGIN = 96  # of the right side, for the names of levels, which no curve may cross
_MOST_POINTS = 360  # of a drawn curve; each is the mean of a range of steps, and the band shows the extremes
_MOST_X_TICKS, _MOST_Y_TICKS = 8, 5
_OUTLIER = 4.0  # times the range of the middle 96 %: numbers further out are cut off, and the page says so


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Series that share axes.

    Attributes:
        title: Of the panel.
        lead: Sentences below the title.
        series: At least one, with at least one number.
        levels: (y, text) of horizontal lines for comparison.
        decimals: Of its numbers; None for four significant digits.
        tall: Whether it is the main panel.
    """

    title: str
    lead: str
    series: tuple[svg.Series, ...]
    levels: tuple[tuple[float, str], ...] = ()
    decimals: int | None = None
    tall: bool = False


@dataclass(frozen=True, kw_only=True)
class RunAxis:
    """The x axis that all panels share.

    Attributes:
        end: How far the run has come, in units of `title`.
        title: `epoch` or `step`.
        alarms: (first, last) of each alarm.
    """

    end: float
    title: str
    alarms: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class DrawnPanel:
    """A panel as it is drawn, in SVG units.

    Attributes:
        levels: (y in SVG units, y, text) of the levels near the curves.
        alarms: (x, width) of the shaded ranges.
        last: The last number of each curve.
        values: (x, number) of each curve as shown at the pointer; x is in the units of the run axis.
        is_cut: Whether outliers are cut off.
    """

    panel: Panel
    x_axis: RunAxis
    axes: svg.Axes
    curves: tuple[svg.Curve, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    levels: tuple[tuple[float, float, str], ...]
    alarms: tuple[tuple[float, float], ...]
    last: tuple[str, ...]
    values: tuple[tuple[tuple[float, str], ...], ...]
    is_cut: bool


def draw_panel(panel: Panel, x_axis: RunAxis) -> DrawnPanel:
    """Return a panel in SVG units."""
    widths = [x_axis.end / _MOST_POINTS if len(series.points) > _MOST_POINTS else 0.0 for series in panel.series]
    segments = list(map(svg.split_into_segments, panel.series, widths))
    low, high, is_cut = _choose_y_range(panel, segments)
    y_ticks = svg.make_ticks(low, high, _MOST_Y_TICKS)
    width, height = _TALL_SIZE if panel.tall else _SIZE
    y_range = (y_ticks[0], y_ticks[-1])
    axes = svg.Axes(x_range=(0.0, x_axis.end), y_range=y_range, width=width, height=height, right_margin=_LEVEL_MARGIN)
    x_ticks = [x for x in svg.make_ticks(0, x_axis.end, _MOST_X_TICKS) if x <= x_axis.end]
    alarms = [(axes.x(first), last) for first, last in x_axis.alarms]
    numbers = [[y for _, y in series.points if y is not None] for series in panel.series]
    return DrawnPanel(
        panel=panel,
        x_axis=x_axis,
        axes=axes,
        curves=tuple(map(svg.draw_curve, count(), panel.series, segments, repeat(axes))),
        x_ticks=tuple((axes.x(x), format_number(x)) for x in x_ticks),
        y_ticks=tuple((axes.y(y), format_number(y)) for y in y_ticks),
        levels=tuple((axes.y(y), y, text) for y, text in panel.levels if y_ticks[0] <= y <= y_ticks[-1]),
        alarms=tuple((x, max(2.0, round(axes.x(last) - x, 1))) for x, last in alarms),
        last=tuple(format_number(ys[-1], panel.decimals) if ys else "–" for ys in numbers),
        values=tuple(
            tuple(
                (float(f"{x:.6g}"), format_number(y, panel.decimals))
                for segment in curve_segments
                for x, y in zip(segment.xs, segment.means, strict=True)
            )
            for curve_segments in segments
        ),
        is_cut=is_cut,
    )


def format_number(value: float, decimals: int | None = None) -> str:
    """Return a number as axes and legends show it: with `decimals`, or with at most four significant digits."""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _choose_y_range(panel: Panel, segments: Sequence[Sequence[svg.Segment]]) -> tuple[float, float, bool]:
    """Return the range of the y axis, and whether numbers far outside of it are cut off."""
    lows = sorted(y for curve in segments for segment in curve for y in segment.lows)
    highs = sorted(y for curve in segments for segment in curve for y in segment.highs)
    low, high = lows[len(lows) // 50], highs[-1 - len(highs) // 50]
    reach = _OUTLIER * max(high - low, 1e-12)
    low, high = max(lows[0], low - reach), min(highs[-1], high + reach)
    is_cut = (low, high) != (lows[0], highs[-1])
    span = high - low
    near = [level for level, _ in panel.levels if low - span <= level <= high + span]  # others would flatten the curves
    return *svg.widen_if_constant(min([low, *near]), max([high, *near])), is_cut
