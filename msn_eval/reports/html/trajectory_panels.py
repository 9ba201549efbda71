"""Trajectory panels: which numbers of a run stand beside which, and at what heights they mean something."""

import math
from collections.abc import Sequence

from msn_eval.errors import printable
from msn_eval.features.collapse import LEAST_SPREAD
from msn_eval.monitor.alarms import Line
from msn_eval.monitor.trajectory import Point, Trajectory
from msn_eval.reports.html.panels import Curve, Extent, Panel
from msn_eval.results.table import Column, Row, Table, make_table

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
