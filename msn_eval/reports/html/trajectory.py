"""Trajectory as a page and as a plot: one HTML file that asks nothing of any network, and one PNG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msn_eval.errors import printable
from msn_eval.features.collapse import LEAST_SPREAD
from msn_eval.features.visualization import as_png
from msn_eval.monitor.alarms import Line
from msn_eval.monitor.trajectory import Point, Trajectory
from msn_eval.reports.html.page import render_offline
from msn_eval.reports.html.panels import Curve, Extent, Laid, Panel, lay_out
from msn_eval.reports.text_tables import FAILED
from msn_eval.results.table import Column, Row, Table, make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#3b5bdb", "#e8590c", "#0b8a6a", "#c2255c", "#7048e8", "#0c8599", "#846358", "#5c7a00")
_ALARM, _INK, _SOFT, _LINE = "#c92a2a", "#17202b", "#5a6878", "#e2e6ec"
_INCHES = (12.0, 3.4)  # width of the plot, height of a row of it
_DOTS_PER_INCH = 110
_MOST_ALARMS, _TITLE_CHARACTERS = 4, 110  # in the plot's title


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What is drawn of a run: its panels, laid out once for page and plot."""

    trajectory: Trajectory
    extent: Extent
    panels: tuple[Laid, ...]


def sheet_of(trajectory: Trajectory) -> Sheet:
    """Lay out a run as it stands."""
    extent = extent_of(trajectory)
    return Sheet(
        trajectory=trajectory, extent=extent, panels=tuple(lay_out(panel, extent) for panel in panels_of(trajectory))
    )


def render_page(sheet: Sheet) -> str:
    """Give the page of a run."""
    trajectory, extent, laid = sheet.trajectory, sheet.extent, sheet.panels
    shown = [[curve.shown for curve in panel.curves] for panel in laid]
    return render_offline(
        "trajectory.html",
        script="trajectory.js",
        styles=["page.css", "trajectory.css"],
        data={"end": extent.end, "unit": extent.title, "panels": shown},
        name=printable(trajectory.facts.name),
        facts=facts_of(trajectory),
        alarms=[(printable(str(alarm)), alarm.on) for alarm in trajectory.alarms],
        notices=[printable(notice) for notice in trajectory.notices],
        panels=laid,
        heads=_heads(trajectory),
        rows=_rows(trajectory),
        has_problems=any(point.look is not None and point.look.problem for point in trajectory.points),
    )


def facts_of(trajectory: Trajectory) -> list[str]:
    """Say in a few words where a run stands."""
    steps, unit = trajectory.steps, trajectory.steps_an_epoch
    of = "" if steps is None else f" of {steps:,}"
    epochs = f"epoch {trajectory.step // unit:,} of {trajectory.facts.epochs:,}" if unit and steps is not None else ""
    count = len(trajectory.points)
    scored = f"{count:,} snapshot{'' if count == 1 else 's'} scored"
    known = [printable(trajectory.facts.method), f"step {trajectory.step:,}{of}", epochs, scored]
    return [fact for fact in known if fact]


def _heads(trajectory: Trajectory) -> list[str]:
    columns = scores_of(trajectory).columns
    one_subset = len({column.subset for column in columns}) == 1
    return [column_name(column, one_subset=one_subset) for column in columns]


def _rows(trajectory: Trajectory) -> list[tuple[str, str, list[str], str, str, str]]:
    """Give the rows of the table of snapshots, the newest first: step, epoch, scores, rank, spread, what is wrong."""
    table = scores_of(trajectory)
    rows = rows_by_weights(table)

    def score(point: Point, place: int) -> str:
        row = rows.get(point.results[0].checkpoint.weights_sha256) if point.results else None
        cell = None if row is None else table.cells.get((row, table.columns[place]))
        if cell is None:
            return "–"
        if cell.mean is None:
            return FAILED
        return f"{100 * cell.mean:.1f}" + ("" if cell.std is None else f" ± {100 * cell.std:.1f}")

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    return [
        (
            f"{point.step:,}",
            f"{point.epoch:,}",
            [score(point, place) for place in range(len(table.columns))],
            number(point.look.feature_rank if point.look else None),
            number(point.look.feature_spread if point.look else None),
            printable(point.look.problem) if point.look else "",
        )
        for point in reversed(trajectory.points)
    ]


def render_plot(sheet: Sheet) -> bytes:
    """Give the plot of a run that has at least one panel, as a PNG file."""
    from matplotlib.figure import Figure

    tall = [panel for panel in sheet.panels if panel.tall]
    others = [panel for panel in sheet.panels if not panel.tall]
    lines = len(tall) + (len(others) + 1) // 2
    figure = Figure(figsize=(_INCHES[0], 0.7 + _INCHES[1] * lines), dpi=_DOTS_PER_INCH, layout="constrained")
    grid = figure.add_gridspec(lines, 2)
    for number, panel in enumerate(tall):
        _draw_panel(figure.add_subplot(grid[number, :]), panel, sheet.extent)
    for number, panel in enumerate(others):
        _draw_panel(figure.add_subplot(grid[len(tall) + number // 2, number % 2]), panel, sheet.extent)
    alarms = [alarm for alarm in sheet.trajectory.alarms if alarm.on] or sheet.trajectory.alarms
    told = [f"ALARM: {alarm}" for alarm in alarms[:_MOST_ALARMS]] or ["no alarm"]
    title = [f"{sheet.trajectory.facts.name}: {', '.join(facts_of(sheet.trajectory))}", *told]
    lines_of_title = "\n".join(
        _plain(f"{one[:_TITLE_CHARACTERS]}…" if len(one) > _TITLE_CHARACTERS else one) for one in title
    )
    figure.suptitle(lines_of_title, fontsize=12, color=_ALARM if alarms else _INK)
    return as_png(figure)


def _draw_panel(axes: "Axes", panel: Laid, extent: Extent) -> None:
    for curve in panel.curves:
        colour, name = _COLOURS[curve.number % len(_COLOURS)], curve.name
        for piece in curve.pieces:
            marker = "o" if curve.dots else ""
            axes.plot(piece.xs, piece.means, color=colour, linewidth=1.6, marker=marker, markersize=4, label=name)
            axes.fill_between(piece.xs, piece.lows, piece.highs, color=colour, alpha=0.15, linewidth=0)
            name = "_"  # one line in the legend
    axes.set_ylim(panel.y_low, panel.y_high)
    axes.set_xlim(0, extent.end)
    for height, (_, text) in zip(panel.heights, panel.levels, strict=True):
        axes.axhline(height, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
        right = axes.get_yaxis_transform()
        axes.text(0.995, height, text, transform=right, fontsize=8, color=_SOFT, ha="right", va="bottom")
    for first, last in extent.alarms:
        axes.axvspan(first, max(last, first + extent.end / 300), color=_ALARM, alpha=0.08, linewidth=0)
    axes.set_title(panel.title, fontsize=11, loc="left", color=_INK, weight="bold")
    axes.set_xlabel(extent.title, fontsize=9, color=_SOFT)
    axes.tick_params(labelsize=9, colors=_SOFT, length=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_LINE)
    axes.legend(fontsize=8, frameon=False, loc="best")


def _plain(text: str) -> str:
    """Give a text that matplotlib takes for no mathematics."""
    return printable(text).replace("$", r"\$")


MOST_PROBES = 8


def scores_of(trajectory: Trajectory) -> Table:
    """Give the records of a run as a table: a row a snapshot, a column a protocol."""
    return make_table(result for point in trajectory.points for result in point.results)


def extent_of(trajectory: Trajectory) -> Extent:
    """Give how far a run goes, in epochs where it is known how many steps these have."""
    unit = trajectory.steps_an_epoch or 1
    return Extent(
        end=max(1, trajectory.step) / unit,
        title="epoch" if trajectory.steps_an_epoch else "step",
        alarms=tuple((alarm.first / unit, alarm.last / unit) for alarm in trajectory.alarms),
    )


def panels_of(trajectory: Trajectory) -> list[Panel]:
    """Give the panels of a run that hold at least one number, its scores first."""
    k, unit = trajectory.facts.prototypes, trajectory.steps_an_epoch or 1
    lines = trajectory.lines
    most = () if k is None else ((math.log(k), f"log k = {math.log(k):.2f}"),)

    def journal(**names: str) -> tuple[Curve, ...]:
        found = [_curve(lines, name, text, unit) for name, text in names.items()]
        return tuple(one for one in found if any(value is not None for _, value in one.values))

    rank, spread = (_looks(trajectory.points, name, unit) for name in ("feature_rank", "feature_spread"))
    made = [
        _scores(trajectory, unit),
        Panel(
            title="Loss and its parts",
            lead="At log k predictions prefer no prototype; near zero with a high me-max all images are on one.",
            curves=journal(loss="loss", cross_entropy="cross-entropy", me_max="me-max"),
            levels=most,
        ),
        Panel(
            title="Entropy of targets and predictions",
            lead="In nats, of single images. At log k they say nothing.",
            curves=journal(target_entropy="targets", entropy="predictions"),
            levels=most,
        ),
        Panel(
            title="Prototypes in use",
            lead="Those that are the nearest of some image of a batch.",
            curves=journal(prototypes_in_use="in a batch"),
            levels=() if k is None else ((float(k), f"all {k:,}"),),
        ),
        Panel(
            title="Feature rank",
            lead="RankMe of the encoder's features: how many directions they fill. It grows with the number of images.",
            curves=(*journal(feature_rank="training batch"), *rank),
        ),
        Panel(
            title="Spread",
            lead="0 where all images have the same direction, near 1 where directions are random.",
            curves=(*journal(feature_spread="features", output_spread="head's outputs"), *spread),
            levels=((LEAST_SPREAD, "collapsed below"),),
        ),
        Panel(
            title="Gradient norm",
            lead="Before clipping.",
            curves=journal(gradient_norm="encoder and head", prototype_gradient_norm="prototypes"),
        ),
    ]
    return [panel for panel in made if panel.curves]


def _curve(lines: Sequence[Line], name: str, text: str, unit: int) -> Curve:
    """Give one number of the journal; where a line has none of that name it was not logged, which is no gap."""
    return Curve(name=text, values=tuple(((line["step"] or 0) / unit, line[name]) for line in lines if name in line))


def _looks(points: Sequence[Point], name: str, unit: int) -> tuple[Curve, ...]:
    seen = [(point, getattr(point.look, name)) for point in points if point.look is not None]
    if not any(value is not None for _, value in seen):
        return ()
    images = next(point.look.images for point, _ in seen if point.look is not None)
    return (
        Curve(
            name=f"snapshots, {images:,} validation images",
            values=tuple((point.step / unit, value) for point, value in seen),
            texts=tuple(f"{place_text(point)}: {value:.4g}" if value is not None else "" for point, value in seen),
        ),
    )


def _scores(trajectory: Trajectory, unit: int) -> Panel:
    table = scores_of(trajectory)
    rows = rows_by_weights(table)
    curves = tuple(_score(trajectory.points, rows, table, column, unit) for column in table.columns[:MOST_PROBES])
    classes = {column.classes for column in table.columns}
    subsets = {column.subset for column in table.columns}
    draws = max((cell.draws or 1 for cell in table.cells.values()), default=1)
    more = "" if len(table.columns) <= MOST_PROBES else f" The first {MOST_PROBES} of {len(table.columns)} protocols."
    return Panel(
        title="Accuracy of the frozen encoder",
        lead=f"Top-1 in percent on {', '.join(sorted({printable(one.data) for one in table.columns}))}, "
        f"{', '.join(printable(one) for one in sorted(subsets))}"
        f"{'; mean and one standard deviation over draws' if draws > 1 else ''}.{more}",
        curves=tuple(one for one in curves if any(value is not None for _, value in one.values)),
        levels=tuple((100 / one, "chance") for one in classes) if len(classes) == 1 else (),
        decimals=1,
        tall=True,
    )


def rows_by_weights(table: Table) -> dict[str | None, Row]:
    """Give the rows of a run's table by the weights that they are of: of a run's snapshots one network is evaluated."""
    return {row.weights_sha256: row for row in table.rows}


def _score(points: Sequence[Point], rows: dict[str | None, Row], table: Table, column: Column, unit: int) -> Curve:
    name = column_name(column, one_subset=len({one.subset for one in table.columns}) == 1)
    values, spread, texts = [], [], []
    for point in points:
        cell = table.cells.get((rows[point.results[0].checkpoint.weights_sha256], column)) if point.results else None
        if cell is None:
            continue
        mean, std = cell.mean, cell.std
        values.append((point.step / unit, None if mean is None else 100 * mean))
        spread.append(None if std is None else 100 * std)
        beside = "" if std is None else f" ± {100 * std:.1f}"
        texts.append("" if mean is None else f"{place_text(point)}: {name} {100 * mean:.1f}{beside}")
    return Curve(name=name, values=tuple(values), spread=tuple(spread), texts=tuple(texts))


def column_name(column: Column, *, one_subset: bool) -> str:
    """Give a protocol's name in a legend; the subset only where there are several."""
    return printable(column.group if one_subset else f"{column.group}, {column.subset}")


def place_text(point: Point) -> str:
    """Say where in the run a snapshot stands."""
    return f"step {point.step:,}, epoch {point.epoch}"
