"""Panels: numbers over the steps of a run, laid out here, drawn as SVG by the page's template and as PNG by matplotlib."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

_WIDTH, _HEIGHT = 760, 250  # SVG units
_TALL_WIDTH, _TALL_HEIGHT = 1240, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 12, 42
_MOST_PLACES = 360  # that a line is drawn with; each stands for a stretch of steps, and the band for its extremes
_MOST_X_TICKS, _MOST_Y_TICKS = 8, 5
_OUTLYING = 4.0  # times the middle 96 %: what is further out is cut off, and said to be

Value = tuple[float, float | None]  # where, and how much; None where it is not finite


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Numbers of one kind.

    values: by rising place
    spread: beside them, where they are means over draws
    texts:  of each value, where it is a measured point of its own; without, a line alone is drawn
    """

    name: str
    values: tuple[Value, ...]
    spread: tuple[float | None, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves that share an axis.

    levels: heights to be seen against, with what they are
    decimals: of its numbers, None for as many as matter
    tall:   the panel that is looked at first
    """

    title: str
    lead: str
    curves: tuple[Curve, ...]
    levels: tuple[tuple[float, str], ...] = ()
    decimals: int | None = None
    tall: bool = False


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What all panels have in common: how far the run goes, in what, and where an alarm holds."""

    end: float
    title: str
    alarms: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Thinned:
    """A stretch of a curve without gaps: places, means, and the least and the most of what each stands for."""

    xs: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)
    highs: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A curve on paper.

    last:         its last number
    pieces:       its numbers between gaps, as many as are drawn; `lines` and `bands` are these in SVG units
    shown:        what is told at the pointer, each with its place
    """

    number: int
    name: str
    last: str
    pieces: tuple[Thinned, ...]
    lines: tuple[str, ...]
    bands: tuple[str, ...]
    dots: tuple[tuple[float, float, str], ...]
    shown: tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True)
class Laid:
    """Everything that is drawn of a panel: in SVG units, but for `heights`, those of its levels, and `y_low` and `y_high`."""

    title: str
    lead: str
    curves: tuple[Drawn, ...]
    x_title: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    levels: tuple[tuple[float, str], ...]
    heights: tuple[float, ...]
    alarms: tuple[tuple[float, float], ...]
    tall: bool
    cut: bool
    width: int
    height: int
    right: float
    bottom: float
    y_low: float
    y_high: float
    left: float = _LEFT
    top: float = _TOP


@dataclass(frozen=True, kw_only=True)
class _Paper:
    """Where a panel's numbers come to stand: `end` steps across, `low` to `high` up, on `width` x `height` SVG units."""

    end: float
    low: float
    high: float
    width: int
    height: int

    def across(self, x: float) -> float:
        return round(_LEFT + min(1.0, x / self.end) * (self.width - _LEFT - _RIGHT), 1)

    def down(self, y: float) -> float:
        share = (min(self.high, max(self.low, y)) - self.low) / (self.high - self.low)
        return round(self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM), 1)

    def line(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{self.across(x)},{self.down(y)}" for x, y in zip(xs, ys, strict=True))


def lay_out(panel: Panel, extent: Extent) -> Laid:
    """Lay out a panel whose curves hold at least one number."""
    width, height = (_TALL_WIDTH, _TALL_HEIGHT) if panel.tall else (_WIDTH, _HEIGHT)
    stretches = [_stretches(curve, extent.end) for curve in panel.curves]
    low, high, cut = _limits(panel, stretches)
    ticks = _ticks(low, high, _MOST_Y_TICKS)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    paper = _Paper(end=extent.end, low=low, high=high, width=width, height=height)
    across, down = paper.across, paper.down
    return Laid(
        title=panel.title,
        lead=panel.lead,
        curves=tuple(
            _drawn(number, curve, pieces, paper, panel.decimals)
            for number, (curve, pieces) in enumerate(zip(panel.curves, stretches, strict=True))
        ),
        x_title=extent.title,
        x_ticks=tuple((across(x), number_text(x)) for x in _ticks(0, extent.end, _MOST_X_TICKS) if x <= extent.end),
        y_ticks=tuple((down(y), number_text(y)) for y in ticks),
        levels=tuple((down(y), text) for y, text in panel.levels if low <= y <= high),
        heights=tuple(y for y, _ in panel.levels if low <= y <= high),
        alarms=tuple(
            (across(first), max(2.0, round(across(last) - across(first), 1))) for first, last in extent.alarms
        ),
        tall=panel.tall,
        cut=cut,
        width=width,
        height=height,
        right=width - _RIGHT,
        bottom=height - _BOTTOM,
        y_low=low,
        y_high=high,
    )


def _drawn(number: int, curve: Curve, pieces: Sequence[Thinned], paper: _Paper, decimals: int | None) -> Drawn:
    known = [(place, value) for place, (_, value) in enumerate(curve.values) if value is not None]
    return Drawn(
        number=number,
        name=curve.name,
        last=number_text(known[-1][1], decimals) if known else "–",
        pieces=tuple(pieces),
        lines=tuple(paper.line(one.xs, one.means) for one in pieces),
        bands=tuple(
            f"{paper.line(one.xs, one.highs)} {paper.line(one.xs[::-1], one.lows[::-1])}"
            for one in pieces
            if len(one.xs) > 1 and one.lows != one.highs
        ),
        dots=tuple(
            (paper.across(curve.values[place][0]), paper.down(value), curve.texts[place])
            for place, value in known
            if curve.texts
        ),
        shown=tuple(
            (float(f"{x:.6g}"), number_text(y, decimals))
            for one in pieces
            for x, y in zip(one.xs, one.means, strict=True)
        ),
    )


def number_text(value: float, decimals: int | None = None) -> str:
    """Give a number as axes and legends show it: with so many decimals, or at most four digits that matter."""
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _stretches(curve: Curve, end: float) -> list[Thinned]:
    """Give a curve in pieces between its gaps, with at most so many places over the whole run."""
    width = end / _MOST_PLACES if len(curve.values) > _MOST_PLACES else 0.0
    spread = curve.spread or (None,) * len(curve.values)
    found = []
    for is_known, stretch in groupby(zip(curve.values, spread, strict=True), key=lambda one: one[0][1] is not None):
        if is_known:
            rows = [(x, y, beside or 0.0) for (x, y), beside in stretch if y is not None]
            found.append(_thinned(rows, width))
    return found


def _thinned(rows: Sequence[tuple[float, float, float]], width: float) -> Thinned:
    thin = Thinned()
    for _, stretch in groupby(enumerate(rows), key=lambda one: int(one[1][0] / width) if width else one[0]):
        together = [row for _, row in stretch]
        thin.xs.append(together[len(together) // 2][0])
        thin.means.append(math.fsum(y for _, y, _ in together) / len(together))
        thin.lows.append(min(y - beside for _, y, beside in together))
        thin.highs.append(max(y + beside for _, y, beside in together))
    return thin


def _limits(panel: Panel, stretches: Sequence[Sequence[Thinned]]) -> tuple[float, float, bool]:
    """Give the span of the y axis, and whether single values far outside of it are cut off."""
    pieces = [one for curve in stretches for one in curve]
    lows = sorted(y for one in pieces for y in one.lows)
    highs = sorted(y for one in pieces for y in one.highs)
    low, high = lows[len(lows) // 50], highs[-1 - len(highs) // 50]
    reach = _OUTLYING * max(high - low, 1e-12)
    least, most = max(lows[0], low - reach), min(highs[-1], high + reach)
    cut = (least, most) != (lows[0], highs[-1])
    for level, _ in panel.levels:  # drawn where they are near: a level far away would flatten the curve
        if most < level <= most + (most - least) or least > level >= least - (most - least):
            least, most = min(least, level), max(most, level)
    if most - least < 1e-9 * max(1.0, abs(most)):
        least, most = least - max(0.5, 0.1 * abs(least)), most + max(0.5, 0.1 * abs(most))
    return least, most, cut


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Give round numbers that cover a span, at most so many and two."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
