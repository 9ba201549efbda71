"""Table: results into mean, spread and count over draws; one row a checkpoint, one column a protocol."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from msn_eval.config.recipes import AugmentedRecipe, LinearRecipe, Params
from msn_eval.results.record import Result

# Settings that stand in a column's title; others where they tell it from its neighbours.
_IN_TITLES = ("k", "temperature", "auto")
_SUBSET_ORDER = ("1img", "2imgs", "5imgs", "1pct", "10pct", "full")
_PROBE_ORDER = ("logistic", "linear", "linear-augmented", "knn", "ncm", "ridge", "finetune")
Place = tuple[str, str | None, str]  # weights_sha256, key and protocol_id: what a cell is of


@dataclass(frozen=True, kw_only=True)
class Column:
    """One protocol.

    images_per_class: labelled images a class, on average
    classes:          of the data set
    reason:           wherein it differs from other protocols of the same probe in this table, field by field, or empty
    published:        whether its numbers were published by others: never ranked, and never in one column with measured ones
    """

    protocol_id: str
    probe: str
    params: Params = field(hash=False)
    subset: str
    data: str
    images_per_class: float
    classes: int
    reason: str
    published: bool = False

    @property
    def group(self) -> str:
        """Give what holds for every subset: `knn k=10 T=0.07`, and what sets it apart: `knn k=10 T=0.07, precision=reduced`."""
        neighbours = [f"k={self.params['k']:g}", f"T={self.params['temperature']:g}"] if "k" in self.params else []
        chosen = ["λ=auto"] if "auto" in self.params else []  # not the same protocol as those whose λ was given
        taps = [f"taps={self.params['taps']}"] if "taps" in self.params else []
        name = " ".join([self.probe, *neighbours, *chosen, *taps])
        return ", ".join(part for part in (name, self.reason) if part)

    @property
    def images(self) -> str:
        """Give the labelled images a class, to three digits."""
        return f"{self.images_per_class:.3g}" if self.images_per_class < 1000 else f"{self.images_per_class:.0f}"

    @property
    def strength(self) -> str:
        """Give lambda, or nothing."""
        if "auto" in self.params:
            return "auto"
        return f"{self.params['lambda']:g}" if "lambda" in self.params else ""

    @property
    def lines(self) -> tuple[str, ...]:
        """Give the rest: the subset, its images a class, and lambda."""
        parts = (self.subset, f"{self.images} image{'' if self.images == '1' else 's'} a class")
        return (*parts, f"λ={self.strength}") if self.strength else parts

    @property
    def title(self) -> str:
        return ", ".join(self.lines)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint: its network, told apart by weights and key; `note` says what every reader must know of it.

    source: where its numbers were published, empty where they were measured
    """

    name: str
    arch: str
    weights_sha256: str | None
    key: str | None
    note: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the images of a cell say about it, where they were asked.

    interval: 95 % interval of the mean over test images of this kind, fractions
    rank:     among the checkpoints of its column; those that their images cannot tell apart share one
    """

    interval: tuple[float, float] | None = None
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The draws of one checkpoint under one protocol.

    mean, std: fractions in [0, 1] of top-1; std is the sample standard deviation over draws, None for one draw;
               mean is None where a draw failed
    draws:     how many; None where a publication does not say
    status:    that of the worst draw, or `published`
    results:   ids of the records
    """

    mean: float | None
    std: float | None
    draws: int | None
    status: str
    standing: Standing = Standing()
    results: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows, columns, and the cells that exist.

    notices: what a reader of the whole table must know
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[Row, Column], Cell]
    notices: tuple[str, ...] = ()

    def groups(self) -> dict[str, tuple[Column, ...]]:
        """Give the columns by probe, its settings and what sets them apart, in order."""
        grouped: defaultdict[str, list[Column]] = defaultdict(list)
        for column in self.columns:
            grouped[column.group].append(column)
        return {group: tuple(columns) for group, columns in grouped.items()}

    def rows_of(self, columns: Sequence[Column]) -> list[tuple[Row, list[Cell | None]]]:
        """Give the rows that have a cell in one of the columns, with their cells; None is a missing one."""
        lines = [(row, [self.cells.get((row, column)) for column in columns]) for row in self.rows]
        return [(row, cells) for row, cells in lines if any(cells)]


def make_table(
    results: Iterable[Result],
    *,
    standings: Mapping[Place, Standing] | None = None,
    published: Table | None = None,
    notices: Sequence[str] = (),
) -> Table:
    """Put results into rows and columns, each result once. Two protocols never share a column.

    standings: what the images of each cell say, where they were asked
    published: rows and columns to stand beside the measured ones
    """
    kept = list({_identity(result): result for result in results}.values())
    columns = {column.protocol_id: column for column in _columns(kept)}
    rows = _rows(kept)
    draws: defaultdict[Place, list[Result]] = defaultdict(list)
    for result in kept:
        draws[place_of(result)].append(result)
    cells = {
        (rows[weights, key], columns[protocol]): _cell(
            group, (standings or {}).get((weights, key, protocol), Standing())
        )
        for (weights, key, protocol), group in draws.items()
    }
    ordered = tuple(sorted(columns.values(), key=_column_order))
    best_first = sorted(rows.values(), key=lambda row: _row_order(row, ordered, cells))
    others = published or Table(rows=(), columns=(), cells={})
    return Table(
        rows=(*best_first, *others.rows),
        columns=tuple(sorted((*ordered, *others.columns), key=_column_order)),
        cells=cells | dict(others.cells),
        notices=(*_other_draws(kept), *others.notices, *notices),
    )


def place_of(result: Result) -> Place:
    """Say in which cell a result belongs."""
    return result.checkpoint.weights_sha256, result.checkpoint.key, result.protocol_id


def _identity(result: Result) -> tuple[object, ...]:
    """Give what a result's id stands for."""
    return *place_of(result), result.split.draw


def _cell(draws: Sequence[Result], standing: Standing) -> Cell:
    from msn_eval.results.statistics import draw_spread  # SciPy, which --help does without

    scores = [result.metrics.top1 for result in draws if result.metrics is not None]
    statuses = {result.status for result in draws}
    ids = tuple(result.id for result in sorted(draws, key=lambda result: result.split.draw))
    if "failed" in statuses:
        return Cell(mean=None, std=None, draws=len(draws), status="failed", results=ids)
    return Cell(
        mean=statistics.fmean(scores),
        std=draw_spread(scores),
        draws=len(draws),
        status="not_converged" if "not_converged" in statuses else "ok",
        standing=standing,
        results=ids,
    )


def _rows(results: Sequence[Result]) -> dict[tuple[str, str | None], Row]:
    by_network: defaultdict[tuple[str, str | None], list[Result]] = defaultdict(list)
    for result in results:
        by_network[result.checkpoint.weights_sha256, result.checkpoint.key].append(result)
    names = Counter(group[0].checkpoint.name for group in by_network.values())
    rows = {}
    for (weights, key), group in by_network.items():
        checkpoint = group[0].checkpoint
        name = checkpoint.name
        if names[name] > 1:  # two checkpoints of one name are told apart by what they are
            same_weights = sum(1 for other, _ in by_network if other == weights) > 1
            name = f"{name} [{weights[:8]}{f' {key}' if same_weights and key else ''}]"
        rows[weights, key] = Row(name=name, arch=checkpoint.arch, weights_sha256=weights, key=key, note=_note(group))
    return rows


def _note(results: Sequence[Result]) -> str:
    """Say what is not as it should be with a network or the images it was given."""
    parts = []
    matched = min(result.checkpoint.matched for result in results)
    if matched < 1:
        parts.append(f"{matched:.1%} of weights loaded")
    patterns = sorted({pattern for result in results for pattern in result.checkpoint.allow_missing})
    if patterns:
        parts.append(f"absent by --allow-missing {' '.join(patterns)}")
    skipped = sorted({result.data.skipped for result in results} - {0})
    if skipped:
        images = "image" if skipped == [1] else "images"
        parts.append(f"{' or '.join(map(str, skipped))} unreadable {images} skipped")
    parts += sorted({result.features.degenerate for result in results if result.features.degenerate})
    return ", ".join(parts)


def _other_draws(results: Sequence[Result]) -> Iterator[str]:
    """Tell of columns whose rows were not measured with the same labelled images: another train folder, the same val."""
    splits: defaultdict[tuple[str, str, str, int], set[str]] = defaultdict(set)
    for result in results:
        key = (result.protocol_id, result.probe.name, result.split.subset, result.split.draw)
        splits[key].add(result.split.sha256)
    apart = sorted({f"{probe} {subset}" for (_, probe, subset, _), digests in splits.items() if len(digests) > 1})
    if apart:
        yield f"Rows were measured with different labelled images, and are not to be compared: {', '.join(apart)}."


def _columns(results: Sequence[Result]) -> list[Column]:
    by_protocol = {result.protocol_id: result for result in results}
    groups: defaultdict[str, list[Result]] = defaultdict(list)
    for result in by_protocol.values():
        params = {name: result.probe.params[name] for name in _IN_TITLES if name in result.probe.params}
        groups[json.dumps([result.probe.name, params], sort_keys=True)].append(result)
    return [
        _column(result, reason)
        for group in groups.values()
        for result, reason in zip(group, _reasons(group), strict=True)
    ]


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


def _reasons(group: Sequence[Result]) -> list[str]:
    """Say for each protocol of one probe wherein it differs from the others, field by field.

    What a subset brings with it (its own rule, and the unreadable images among its own) is told only where two protocols
    of the same subset differ in it. What was set by hand, a limit and what a recipe has otherwise than by default are told
    always: without them the number would be taken for that of the protocol as it stands.
    """
    flat = [dict(_leaves(result.protocol)) for result in group]
    keys = sorted({key for leaves in flat for key in leaves} - _TOLD_ELSEWHERE)
    alike: defaultdict[tuple[str, object], list[dict[str, object]]] = defaultdict(list)
    for result, leaves in zip(group, flat, strict=True):
        alike[result.split.subset, result.probe.params.get("lambda")].append(leaves)
    differing = {
        key for key in keys if any(_differ(one, key) for one in (alike.values() if key in _OF_A_SUBSET else [flat]))
    }
    differing |= {key for leaves in flat for key, value in leaves.items() if _is_by_hand(key) and value is not None}
    differing |= {
        f"probe.params.{name}" for result in group for name in _unusual(result.probe.name, result.probe.params)
    }
    # The images scored follow from a limit and from what was skipped; where these are told, that is enough.
    named = len({result.data.name for result in group}) > 1
    hashed = "data.sha256" in differing
    differing -= {"data.class_map_sha256"} if hashed else set()
    if named or differing & {"limit", "skipped"}:
        differing -= {"data.sha256"}
    same_name = (
        named
        and hashed
        and len({result.data.name for result in group}) < len({leaves.get("data.sha256") for leaves in flat})
    )
    reasons = []
    for result, leaves in zip(group, flat, strict=True):
        parts = [
            f"{key.removeprefix('probe.params.')}={_short(leaves.get(key), [one.get(key) for one in flat])}"
            for key in sorted(differing)
            if key in leaves or not key.startswith("probe.params.")  # a recipe does not have every setting
        ]
        if named and hashed:
            digest = (
                f" {_short(leaves.get('data.sha256'), [one.get('data.sha256') for one in flat])}"
                if same_name and not differing & {"limit", "skipped"}
                else ""
            )
            parts.insert(0, f"{result.data.name}{digest}")
        reasons.append(" ".join(parts))
    return reasons


_TOLD_ELSEWHERE = {"subset.name", "probe.params.lambda", "probe.params", "probe.params.taps", "tap"}
_OF_A_SUBSET = {"subset.rule", "skipped"}
_RECIPES = {"linear": LinearRecipe(), "linear-augmented": AugmentedRecipe()}


def _is_by_hand(key: str) -> bool:
    return key == "limit" or key.startswith("by_hand.")


def _unusual(probe: str, params: Params) -> Iterator[str]:
    """Name the settings that are not those of the probe's recipe; several learning rates are as many protocols."""
    recipe = _RECIPES.get(probe)
    for name, value in params.items():
        usual = getattr(recipe, name, value)
        if value != usual and [value] != usual and f"probe.params.{name}" not in _TOLD_ELSEWHERE:
            yield name


def _differ(flat: Sequence[Mapping[str, object]], key: str) -> bool:
    return len({json.dumps(leaves.get(key)) for leaves in flat}) > 1


def _leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))]


def _short(value: object, others: Sequence[object]) -> str:
    """Give eight digits of a hash where that tells it from the others, else all of the value."""
    text = "none" if value is None else str(value)
    apart = len({str(other)[:8] for other in others}) == len({str(other) for other in others})
    return text[:8] if len(text) == 64 and apart else text


def _column_order(column: Column) -> tuple[object, ...]:
    def place(name: str, order: tuple[str, ...]) -> int:
        return order.index(name) if name in order else len(order)

    return (
        place(column.probe, _PROBE_ORDER),
        column.probe,
        tuple(sorted((name, value) for name, value in column.params.items() if name != "lambda")),
        column.published,
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
