"""Trajectory of a pre-training run as an offline HTML page and as a PNG plot."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from msn_eval.errors import format_count
from msn_eval.features.collapse import LEAST_SPREAD
from msn_eval.monitor.trajectory import Point, Trajectory
from msn_eval.reports.html.page import render_offline
from msn_eval.reports.html.panels import DrawnPanel, Panel, RunAxis, draw_panel
from msn_eval.reports.html.svg import Series
from msn_eval.reports.pictures import as_png, escape_math
from msn_eval.reports.style import get_colour, list_curve_colours, style_figures
from msn_eval.reports.text_tables import MISSING, format_accuracy
from msn_eval.results.table import Cell, Column, make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import HashableList

_PLOT_WIDTH, _ROW_HEIGHT = 12.0, 3.4  # inches
_MOST_ALARMS, _TITLE_CHARACTERS = 4, 110  # in the plot's title
_MOST_PROTOCOLS = 8
_SHARED = ("reason", "subset")  # of columns: named once where all have the same
_LEGEND_CHARACTERS, _SAMPLE_CHARACTERS = 80, 8  # of a line of the legend over one panel; of the sample of a curve
_LEGEND_LINE = 13.5  # points


def render_page(trajectory: Trajectory, panels: Sequence[DrawnPanel]) -> str:
    """Return the page of a run."""
    scores = _read_scores(trajectory)
    x_axis = _run_axis(trajectory)
    return render_offline(
        "trajectory.html",
        title=trajectory.run.name,
        kicker="scores of a pre-training run",
        facts=describe_status(trajectory),
        assets=["trajectory.js", "trajectory.css"],
        data={"end": x_axis.end, "unit": x_axis.title, "panels": [panel.values for panel in panels]},
        alarms=[(str(alarm), alarm.is_active) for alarm in trajectory.alarms],
        notices=trajectory.notices,
        panels=panels,
        headers=_name_columns(scores),
        points=trajectory.points,
        scores=[
            [MISSING if (cell := cells[number]) is None else format_accuracy(cell) for cells in scores.values()]
            for number in range(len(trajectory.points))
        ],
        has_problems=any(point.features is not None and point.features.problem for point in trajectory.points),
    )


def describe_status(trajectory: Trajectory) -> list[str]:
    """Return method, step, epoch and number of scored snapshots as short texts."""
    unit, count = trajectory.steps_per_epoch, len(trajectory.points)
    texts = [trajectory.run.method, f"step {trajectory.step:,}"]
    if unit and trajectory.steps is not None:
        texts[1] += f" of {trajectory.steps:,}"
        texts.append(f"epoch {trajectory.step // unit:,} of {trajectory.run.epochs:,}")
    return [text for text in (*texts, f"{count:,} snapshot{'' if count == 1 else 's'} scored") if text]


def render_plot(trajectory: Trajectory, panels: Sequence[DrawnPanel]) -> bytes:
    """Return the plot of a run with at least one panel, as a PNG file."""
    return as_png(draw_plot(trajectory, panels))


def draw_plot(trajectory: Trajectory, panels: Sequence[DrawnPanel]) -> "Figure":
    """Draw a run with at least one panel."""
    from matplotlib.figure import Figure

    slots: list[str] = []
    for index, drawn in enumerate(panels):  # tall ones, which are first, take both columns
        slots += [str(index)] * (2 if drawn.panel.tall else 1)
    pairs = zip(slots[::2], [*slots[1::2], "."], strict=False)
    rows: list[HashableList[str]] = [[left, right] for left, right in pairs]
    size = (_PLOT_WIDTH, 0.7 + _ROW_HEIGHT * len(rows))
    with style_figures():
        figure = Figure(figsize=size, layout="constrained")
        for number, axes in figure.subplot_mosaic(rows).items():
            _plot_panel(axes, panels[int(number)])
        alarms = [alarm for alarm in trajectory.alarms if alarm.is_active] or trajectory.alarms
        title = [f"{trajectory.run.name}: {', '.join(describe_status(trajectory))}"]
        title += [f"ALARM: {alarm}" for alarm in alarms[:_MOST_ALARMS]] or ["no alarm"]
        colour = get_colour("bad" if alarms else "ink")
        figure.suptitle("\n".join(map(_title_line, title)), fontsize=12, color=colour)
    return figure


def _title_line(text: str) -> str:
    """Return a text that is not too long and not interpreted as mathematics."""
    shown = escape_math(text)
    return f"{shown[:_TITLE_CHARACTERS]}…" if len(shown) > _TITLE_CHARACTERS else shown


def _plot_panel(axes: "Axes", drawn: DrawnPanel) -> None:
    """Draw a panel; the names of curves are above the axes, and those of levels beside them, where no line crosses them."""
    colours, soft = list_curve_colours(), get_colour("soft")
    for curve in drawn.curves:
        colour, label = colours[curve.number % len(colours)], _title_line(curve.name)
        for segment in curve.segments:
            marker = "o" if curve.markers else ""
            axes.plot(segment.xs, segment.means, color=colour, lw=1.6, marker=marker, markersize=4, label=label)
            axes.fill_between(segment.xs, segment.lows, segment.highs, color=colour, alpha=0.15, linewidth=0)
            label = "_"  # one entry per curve in the legend
    end = drawn.x_axis.end
    axes.set(xlim=(0, end), ylim=drawn.axes.y_range, xlabel=drawn.x_axis.title)
    right = axes.get_yaxis_transform()
    for _, y, text in drawn.levels:
        axes.axhline(y, color=soft, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(1.01, y, text, transform=right, fontsize=8, color=soft, va="center")
    for first, last in drawn.x_axis.alarms:
        axes.axvspan(first, max(last, first + end / 300), color=get_colour("bad"), alpha=0.08, linewidth=0)
    axes.tick_params(length=0, colors=soft)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    width = max(len(curve.name) for curve in drawn.curves) + _SAMPLE_CHARACTERS
    columns = max(1, _LEGEND_CHARACTERS * (2 if drawn.panel.tall else 1) // width)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0, borderpad=0.2)
    lines = -(-len(drawn.curves) // columns)
    axes.set_title(drawn.panel.title, fontsize=11, loc="left", weight="bold", pad=6 + _LEGEND_LINE * lines)


def draw_panels(trajectory: Trajectory) -> list[DrawnPanel]:
    """Return the panels of a run that have at least one number, accuracy first."""
    x_axis = _run_axis(trajectory)
    drawn = []
    for panel in _make_panels(trajectory):
        if series := tuple(series for series in panel.series if any(y is not None for _, y in series.points)):
            drawn.append(draw_panel(replace(panel, series=series), x_axis))
    return drawn


def _run_axis(trajectory: Trajectory) -> RunAxis:
    """Return the x axis: epochs if it is known how many steps they have, else steps."""
    unit = trajectory.steps_per_epoch or 1
    return RunAxis(
        end=max(1, trajectory.step) / unit,
        title="epoch" if trajectory.steps_per_epoch else "step",
        alarms=tuple((alarm.first / unit, alarm.last / unit) for alarm in trajectory.alarms),
    )


def _make_panels(trajectory: Trajectory) -> list[Panel]:
    k, unit = trajectory.run.prototypes, trajectory.steps_per_epoch or 1
    log_k = () if k is None else ((math.log(k), f"log k = {math.log(k):.2f}"),)

    def journal(**names: str) -> tuple[Series, ...]:
        # A line without a name did not log it, which is not a gap.
        steps = {name: [line for line in trajectory.lines if name in line] for name in names}
        points = {name: tuple(((line["step"] or 0) / unit, line[name]) for line in steps[name]) for name in names}
        return tuple(Series(name=text, points=points[name]) for name, text in names.items())

    measured = [(point, point.features) for point in trajectory.points if point.features is not None]

    def snapshots(name: str) -> Series:
        values = [(point, getattr(features, name)) for point, features in measured]
        return Series(
            name=f"snapshots, {format_count(measured[0][1].images, 'validation image')}" if measured else "",
            points=tuple((point.step / unit, value) for point, value in values),
            texts=tuple(f"{_describe_position(point)}: {value or 0:.4g}" for point, value in values),
        )

    return [
        _accuracy_panel(trajectory, unit),
        Panel(
            title="Loss and its parts",
            lead="At log k predictions prefer no prototype; near zero with a high me-max all images are on one.",
            series=journal(loss="loss", cross_entropy="cross-entropy", me_max="me-max"),
            levels=log_k,
        ),
        Panel(
            title="Entropy of targets and predictions",
            lead="In nats, of single images. At log k they prefer no prototype.",
            series=journal(target_entropy="targets", entropy="predictions"),
            levels=log_k,
        ),
        Panel(
            title="Prototypes in use",
            lead="Number of prototypes that are the nearest of at least one image of a batch.",
            series=journal(prototypes_in_use="in a batch"),
            levels=() if k is None else ((float(k), f"all {k:,}"),),
        ),
        Panel(
            title="Feature rank",
            lead="RankMe of the encoder's features: how many directions they fill. It grows with the number of images.",
            series=(*journal(feature_rank="training batch"), snapshots("feature_rank")),
        ),
        Panel(
            title="Eigenspectrum",
            lead="Alpha, the exponent of the decay of eigenvalues: the higher, the fewer directions carry the variance.",
            series=(snapshots("feature_alpha"),),
        ),
        Panel(
            title="Spread",
            lead="0 if all images have the same direction, near 1 if directions are random.",
            series=(
                *journal(feature_spread="features", output_spread="outputs of the head"),
                snapshots("feature_spread"),
            ),
            levels=((LEAST_SPREAD, "collapse"),),
        ),
        Panel(
            title="Gradient norm",
            lead="Before clipping.",
            series=journal(gradient_norm="encoder and head", prototype_gradient_norm="prototypes"),
        ),
    ]


def _accuracy_panel(trajectory: Trajectory, unit: int) -> Panel:
    scores = _read_scores(trajectory)
    classes = {column.classes for column in scores}
    reasons, subsets = (sorted({getattr(column, name) for column in scores}) for name in _SHARED)
    data = reasons if len(reasons) == 1 else sorted({column.data for column in scores})
    has_draws = any(cell is not None and (cell.draws or 1) > 1 for cells in scores.values() for cell in cells)
    spread = "; mean and one standard deviation over draws" if has_draws else ""
    shown = f" The first {_MOST_PROTOCOLS} of {len(scores)} protocols." if len(scores) > _MOST_PROTOCOLS else ""
    named = [*zip(_name_columns(scores), scores.values(), strict=True)][:_MOST_PROTOCOLS]
    return Panel(
        title="Accuracy of the frozen encoder",
        lead=f"Top-1 in percent on {', '.join((*data, *subsets))}{spread}.{shown}",
        series=tuple(_accuracy_series(name, trajectory.points, cells, unit) for name, cells in named),
        levels=tuple((100 / count, "chance") for count in classes) if len(classes) == 1 else (),
        decimals=1,
        tall=True,
    )


def _accuracy_series(name: str, points: Sequence[Point], cells: Sequence[Cell | None], unit: int) -> Series:
    measured = [(point, cell) for point, cell in zip(points, cells, strict=True) if cell is not None]
    return Series(
        name=name,
        points=tuple((point.step / unit, None if cell.mean is None else 100 * cell.mean) for point, cell in measured),
        stds=tuple(None if cell.std is None else 100 * cell.std for _, cell in measured),
        texts=tuple(f"{_describe_position(point)}: {name} {format_accuracy(cell)}" for point, cell in measured),
    )


def _read_scores(trajectory: Trajectory) -> dict[Column, list[Cell | None]]:
    """Return the cells of each protocol, one per point."""
    table = make_table(result for point in trajectory.points for result in point.results)
    cells = {(row.weights_sha256, column): cell for (row, column), cell in table.cells.items()}
    weights = [point.results[0].checkpoint.weights_sha256 if point.results else None for point in trajectory.points]
    return {column: [cells.get((sha256, column)) for sha256 in weights] for column in table.columns}


def _name_columns(scores: dict[Column, list[Cell | None]]) -> list[str]:
    """Return the names of protocols, with data set and subset only if there are several."""
    has_one_reason, has_one_subset = (len({getattr(column, name) for column in scores}) == 1 for name in _SHARED)
    names = [column.settings if has_one_reason else column.curve for column in scores]
    return [name if has_one_subset else f"{name}, {column.subset}" for name, column in zip(names, scores, strict=True)]


def _describe_position(point: Point) -> str:
    return f"step {point.step:,}, epoch {point.epoch}"
