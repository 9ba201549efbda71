"""Table: results into mean, spread and count over draws; one row a checkpoint, one column a protocol."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msn_eval.result import Result

_SUBSET_ORDER = ("1img", "2imgs", "5imgs", "1pct", "10pct", "full")
_PROBE_ORDER = ("logistic", "linear", "linear-augmented", "knn", "ncm", "ridge", "finetune")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One protocol.

    images_per_class: labelled images a class, on average
    classes:          of the data set
    reason:           what sets it apart from other columns of the same probe and subset, or empty
    """

    protocol_id: str
    probe: str
    params: Mapping[str, int | float] = field(hash=False)
    subset: str
    data: str
    images_per_class: float
    classes: int
    reason: str

    @property
    def group(self) -> str:
        """Give the probe with the settings that hold for every subset: `knn k=10 T=0.07`."""
        neighbours = [f"k={self.params['k']:g}", f"T={self.params['temperature']:g}"] if "k" in self.params else []
        return " ".join([self.probe, *neighbours])

    @property
    def title(self) -> str:
        """Give the rest: the subset, its images a class, lambda, and what sets the column apart."""
        images = f"{self.images_per_class:.3g}"
        parts = [self.subset, f"{images} image{'' if images == '1' else 's'} a class"]
        if "lambda" in self.params:
            parts.append(f"λ={self.params['lambda']:g}")
        return ", ".join(part for part in (*parts, self.reason) if part)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint: its network, told apart by weights and key; `note` says what every reader must know of it."""

    name: str
    arch: str
    weights_sha256: str
    key: str | None
    note: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The draws of one checkpoint under one protocol.

    mean, std: fractions in [0, 1] of top-1; std is the sample standard deviation over draws, None for one draw;
               mean is None where a draw failed
    status:    that of the worst draw
    """

    mean: float | None
    std: float | None
    draws: int
    status: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows, columns, and the cells that exist."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[Row, Column], Cell]

    def groups(self) -> dict[str, tuple[Column, ...]]:
        """Give the columns by probe and its settings, in order."""
        grouped: defaultdict[str, list[Column]] = defaultdict(list)
        for column in self.columns:
            grouped[column.group].append(column)
        return {group: tuple(columns) for group, columns in grouped.items()}


def make_table(results: Iterable[Result]) -> Table:
    """Put results into rows and columns, each result once. Two protocols never share a column."""
    kept = list({_identity(result): result for result in results}.values())
    columns = {column.protocol_id: column for column in _columns(kept)}
    rows = _rows(kept)
    draws: defaultdict[tuple[Row, Column], list[Result]] = defaultdict(list)
    for result in kept:
        row = rows[result.checkpoint.weights_sha256, result.checkpoint.key]
        draws[row, columns[result.protocol_id]].append(result)
    cells = {place: _cell(group) for place, group in draws.items()}
    ordered = tuple(sorted(columns.values(), key=_column_order))
    return Table(
        rows=tuple(sorted(rows.values(), key=lambda row: _row_order(row, ordered, cells))), columns=ordered, cells=cells
    )


def _identity(result: Result) -> tuple[object, ...]:
    """Give what a result's id stands for."""
    return result.checkpoint.weights_sha256, result.checkpoint.key, result.protocol_id, result.split.draw


def _cell(draws: Sequence[Result]) -> Cell:
    scores = [result.metrics.top1 for result in draws if result.metrics is not None]
    statuses = {result.status for result in draws}
    if "failed" in statuses:
        return Cell(mean=None, std=None, draws=len(draws), status="failed")
    return Cell(
        mean=statistics.fmean(scores),
        std=statistics.stdev(scores) if len(scores) > 1 else None,
        draws=len(draws),
        status="not_converged" if "not_converged" in statuses else "ok",
    )


def _rows(results: Sequence[Result]) -> dict[tuple[str, str | None], Row]:
    identities = {(r.checkpoint.weights_sha256, r.checkpoint.key): r.checkpoint for r in reversed(results)}
    names = [checkpoint.name for checkpoint in identities.values()]
    rows = {}
    for identity, checkpoint in identities.items():
        # Two checkpoints of one name are told apart by what they are.
        twin = names.count(checkpoint.name) > 1
        name = f"{checkpoint.name} [{checkpoint.weights_sha256[:8]}]" if twin else checkpoint.name
        note = "" if checkpoint.matched == 1.0 else f"{checkpoint.matched:.1%} of weights loaded"
        rows[identity] = Row(name=name, arch=checkpoint.arch, weights_sha256=identity[0], key=identity[1], note=note)
    return rows


def _columns(results: Sequence[Result]) -> list[Column]:
    by_protocol = {result.protocol_id: result for result in results}
    alike: defaultdict[str, list[Result]] = defaultdict(list)
    for result in by_protocol.values():
        alike[json.dumps([result.probe.name, dict(result.probe.params), result.split.subset], sort_keys=True)].append(
            result
        )
    return [_column(result, _differences(group)[result.protocol_id]) for group in alike.values() for result in group]


def _column(result: Result, reason: str) -> Column:
    return Column(
        protocol_id=result.protocol_id,
        probe=result.probe.name,
        params=result.probe.params,
        subset=result.split.subset,
        data=result.data.name,
        images_per_class=result.split.images / result.data.classes,
        classes=result.data.classes,
        reason=reason,
    )


def _differences(group: Sequence[Result]) -> dict[str, str]:
    """Say for each of several protocols that look alike in a header wherein it differs from the others."""
    flat = {result.protocol_id: dict(_leaves(result.protocol)) for result in group}
    keys = sorted({key for leaves in flat.values() for key in leaves})
    differing = [key for key in keys if len({json.dumps(leaves.get(key)) for leaves in flat.values()}) > 1]
    reasons = {}
    for result in group:
        leaves = flat[result.protocol_id]
        parts = [f"{key}={_short(leaves.get(key))}" for key in differing if key != "data.class_map_sha256"]
        if "data.sha256" in differing and len({one.data.name for one in group}) > 1:
            parts = [result.data.name, *(part for part in parts if not part.startswith("data.sha256="))]
        reasons[result.protocol_id] = " ".join(parts)
    return reasons


def _leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))]


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text[:8] if len(text) == 64 else text


def _column_order(column: Column) -> tuple[object, ...]:
    def place(name: str, order: tuple[str, ...]) -> int:
        return order.index(name) if name in order else len(order)

    return (
        place(column.probe, _PROBE_ORDER),
        column.probe,
        tuple(sorted((name, value) for name, value in column.params.items() if name != "lambda")),
        column.reason,
        place(column.subset, _SUBSET_ORDER),
        column.subset,
        column.params.get("lambda", 0),
        column.protocol_id,
    )


def _row_order(row: Row, columns: Sequence[Column], cells: Mapping[tuple[Row, Column], Cell]) -> tuple[object, ...]:
    """Best first, column by column; what is missing or failed goes last."""
    means = [cells[row, column].mean if (row, column) in cells else None for column in columns]
    return (*(1.0 if mean is None else -mean for mean in means), row.name)
