"""Trajectory as a page and as a plot: one HTML file that asks nothing of any network, and one PNG."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from msn_eval.errors import printable
from msn_eval.features.visualization import as_png
from msn_eval.monitor.trajectory import Point, Trajectory
from msn_eval.reports.html.page import render_offline
from msn_eval.reports.html.panels import Extent, Laid, lay_out
from msn_eval.reports.html.trajectory_panels import column_name, extent_of, panels_of, rows_by_weights, scores_of
from msn_eval.reports.text_tables import FAILED

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
