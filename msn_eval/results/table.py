"""Table of results: mean, spread and count over draws, one row per checkpoint and one column per protocol."""

import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, TypeVar

from msn_eval.config.recipes import AugmentedRecipe, LinearRecipe, Params
from msn_eval.errors import UsageError, did_you_mean, format_count
from msn_eval.results.data_sets import DataSetAverages
from msn_eval.results.record import Result, flatten_fields
from msn_eval.results.row_names import Named, RefusedCheckpoint, name_networks
from msn_eval.results.statistics import draw_spread

# Hyper-parameters that are part of a column's title. Others are shown only where they differ.
_TITLE_PARAMS = ("temperature", "auto")
_SYMBOLS = {"k": "k", "temperature": "T"}
_SUBSET_SIZE = re.compile(r"(?P<number>\d+)(?P<unit>imgs?|pct)|(?P<full>full)")
_PROBE_ORDER = ("logistic", "linear", "linear-augmented", "knn", "ncm", "ridge", "finetune")
_RECIPES = {"linear": LinearRecipe(), "linear-augmented": AugmentedRecipe()}
_SHOWN_ELSEWHERE = {"subset.name", "probe.params.k", "probe.params.lambda", "probe.params.taps", "tap"}
_TEST_FIELDS = {"data", "skipped", "plugins", "trained_on", "class_map", "labels"}  # a test set has its own
_SUBSET_FIELDS = {"subset.rule", "skipped"}
_HASH_DIGITS = 64
# Fields of a protocol in words. Others are named by their keys.
_WORDS = {
    "by_hand.image_pixels": "{} px",
    "by_hand.decoder": "decoded by {}",
    "by_hand.canary": "random labels {}",
    "precision": "{} precision",
    "version": "protocol version {}",
    "data.sha256": "images {}",
    "data.class_map_sha256": "classes {}",
    "skipped": "without unreadable images {}",
    "subset.rule": "subsets drawn by {}",
    "limit": "{} per class",
    "probe.params.lr": "learning rate {}",
}
_COUNTED = {"limit": "validation image", "probe.params.epochs": "epoch", "probe.params.lrs": "learning rate"}
MEASURES = {
    "nll": "mean negative log-likelihood of the label, in nats; none where a label has probability 0",
    "brier": "Brier score, the squared error of the probabilities summed over classes",
    "ece": "expected calibration error, 15 bins of equal width",
    "rankme": "RankMe of the features of the validation images",
    "alpha": "exponent of the eigenspectrum of these features",
}
_Key = TypeVar("_Key", bound=Hashable)
CellKey = tuple[str, str | None, str]  # weights_sha256, key and protocol_id: the identity of a cell


@dataclass(frozen=True, kw_only=True)
class Column:
    """One protocol.

    Attributes:
        images_per_class: Mean number of labelled images per class.
        classes: Number of classes of the data set.
        test: The test set, empty for validation images.
        base: Id of the protocol of the same fit on the validation images, None where it is not in the table.
        reason: In words: the data set, what was set manually, and the fields in which it differs from other protocols of the
            same probe in this table.
        published: Whether its numbers come from a publication. These are never ranked, and never share a column with
            measured ones.
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
    test: str = ""
    base: str | None = None

    @property
    def group(self) -> str:
        """The title of its table, such as `knn T=0.07 on digits, 96 px`."""
        return f"{self._describe_probe('temperature')} on {self.reason}"

    @property
    def curve(self) -> str:
        """The title that it shares with other subsets, such as `knn k=10 T=0.07 on digits, 96 px`."""
        return f"{self.settings} on {self.reason}"

    @property
    def settings(self) -> str:
        """The probe and its settings, such as `knn k=10 T=0.07`."""
        return self._describe_probe("k", "temperature")

    def _describe_probe(self, *settings: str) -> str:
        shown = [f"{_SYMBOLS[name]}={self.params[name]:g}" for name in settings if name in self.params]
        lambda_rule = ["λ=auto"] if "auto" in self.params else []  # a different protocol from any given λ
        taps = [f"taps={self.params['taps']}"] if "taps" in self.params else []
        return " ".join([self.probe, *shown, *lambda_rule, *taps])

    @property
    def images(self) -> str:
        """The labelled images per class, to three digits."""
        return f"{self.images_per_class:.3g}" if self.images_per_class < 1000 else f"{self.images_per_class:.0f}"

    @property
    def strength(self) -> str:
        """Lambda, or an empty string."""
        if "auto" in self.params:
            return "auto"
        return f"{self.params['lambda']:g}" if "lambda" in self.params else ""

    @property
    def neighbours(self) -> str:
        """The number of neighbours, or an empty string."""
        return f"{self.params['k']:g}" if "k" in self.params else ""

    @property
    def lines(self) -> tuple[str, ...]:
        """The title below the group: subset, images per class, lambda, neighbours, and test set."""
        lines = [self.subset, f"{self.images} image{'' if self.images == '1' else 's'} per class"]
        lines += [f"λ={self.strength}"] if self.strength else []
        lines += [f"k={self.neighbours}"] if self.neighbours else []
        lines += [f"on {self.test}"] if self.test else []
        return tuple(lines)

    @property
    def title(self) -> str:
        """The lines as one string."""
        return ", ".join(self.lines)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checkpoint, identified by its weights and key.

    Attributes:
        note: What every reader must know of the checkpoint.
        weights_sha256: None for a publication and for a checkpoint that was refused.
        source: The publication of its numbers, or an empty string where they were measured.
    """

    name: str
    arch: str
    weights_sha256: str | None
    key: str | None
    note: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class CellStatistics:
    """Statistics of a cell over test images, where they were computed.

    Attributes:
        interval: 95 % interval of the mean over test images of this kind, as fractions.
        rank: Rank among the checkpoints of the column. Checkpoints that are not separable share a rank.
    """

    interval: tuple[float, float] | None = None
    rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The draws of one checkpoint under one protocol.

    Attributes:
        mean: Mean top-1 over draws, a fraction in [0, 1]. None where a draw failed or its record is damaged.
        std: Sample standard deviation over draws. None for one draw.
        draws: Number of draws. None where a publication does not state it.
        status: Status of the worst draw, `published`, or `refused` for a checkpoint that cannot be used.
        results: Ids of the records, by draw. Empty where one is damaged.
        measures: Means over draws of the table's measures. None where a draw has none.
        change: Difference of the mean on a test set to that of the same fits on the validation images, a fraction. None for
            validation images, or where these have other draws.
    """

    mean: float | None
    std: float | None
    draws: int | None
    status: str
    standing: CellStatistics = CellStatistics()
    results: tuple[str, ...] = ()
    measures: Mapping[str, float | None] = field(default_factory=dict)
    change: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows, columns, the cells that exist, and notices about the table as a unit.

    Attributes:
        measures: Names of what cells show beside accuracy, of `MEASURES`.
        averages: Over data sets, of each rule that was measured on several.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[Row, Column], Cell]
    notices: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    averages: tuple[DataSetAverages, ...] = ()

    def groups(self) -> dict[str, tuple[Column, ...]]:
        """Return the columns by group title, in order."""
        titles = dict.fromkeys(column.group for column in self.columns)
        return {title: tuple(column for column in self.columns if column.group == title) for title in titles}

    def rows_of(self, columns: Sequence[Column]) -> list[tuple[Row, list[Cell | None]]]:
        """Return the rows that have a cell in one of the columns, with their cells. None is a missing cell."""
        rows = [(row, [self.cells.get((row, column)) for column in columns]) for row in self.rows]
        return [(row, cells) for row, cells in rows if any(cells)]


def make_table(
    results: Iterable[Result],
    *,
    refused: Sequence[RefusedCheckpoint] = (),
    standings: Mapping[CellKey, CellStatistics] | None = None,
    published: Table | None = None,
    notices: Sequence[str] = (),
    measures: Sequence[str] = (),
    averages: Sequence[DataSetAverages] = (),
) -> Table:
    """Arrange results in rows and columns, each result once. Two protocols never share a column.

    Args:
        results: Records of any checkpoints and protocols.
        refused: Checkpoints without records, as rows that say so.
        standings: Statistics of each cell over test images, where they were computed.
        published: Rows and columns to show beside the measured ones.
        notices: Further notices of the table.
        measures: Names of `MEASURES` that cells show.
        averages: Averages over data sets, where they were computed.
    """
    records = _last_of_each(results, lambda result: (get_cell_key(result), result.split.draw))
    by_id = {column.protocol_id: column for column in _make_columns(records)}
    all_rows = list(_make_rows(records, refused))
    by_network = {(row.weights_sha256, row.key): row for row in all_rows if row.weights_sha256 is not None}
    cells: dict[tuple[Row, Column], Cell] = {}
    draw_numbers = {}
    for cell_key, draws in _group_by(records, get_cell_key).items():
        weights, key, protocol = cell_key
        standing = (standings or {}).get(cell_key, CellStatistics())
        place = by_network[weights, key], by_id[protocol]
        cells[place] = _make_cell(draws, standing, measures)
        draw_numbers[place] = {result.split.draw for result in draws}
    for row, column in cells:
        base = (row, by_id[column.base]) if column.base is not None else None
        if base in cells and draw_numbers[base] == draw_numbers[row, column]:
            cells[row, column] = _add_change(cells[row, column], cells[base])
    for row, column in product(all_rows, by_id.values()):
        if row.weights_sha256 is None:
            cells[row, column] = Cell(mean=None, std=None, draws=None, status="refused")
    columns = sorted(by_id.values(), key=_column_order)
    rows = sorted(all_rows, key=lambda row: _row_order(row, columns, cells))
    published = published or Table(rows=(), columns=(), cells={})
    return Table(
        rows=(*rows, *published.rows),
        columns=tuple(sorted((*columns, *published.columns), key=_column_order)),
        cells=cells | dict(published.cells),
        notices=(*_list_split_notices(records), *published.notices, *notices),
        measures=tuple(measures),
        averages=tuple(averages),
    )


def sort_rows(table: Table, words: Sequence[str]) -> Table:
    """Return a table with its measured rows in another order; published rows stay last.

    Args:
        table: The table.
        words: `name`, or a probe, a subset or both, in whose columns the best comes first.

    Raises:
        UsageError: No column is of all these words.
    """
    columns = [column for column in table.columns if {*words} <= {column.probe, column.subset}]
    if list(words) != ["name"] and not columns:
        known = sorted({"name", *(word for column in table.columns for word in (column.probe, column.subset))})
        unknown = [word for word in words if word not in known]
        problem = f"no such column.{did_you_mean(unknown[0], known)}" if unknown else "no column is of all of these."
        hint = f"Known: {', '.join(known)}." if unknown else "Give name, a probe, a subset, or PROBE,SUBSET."
        raise UsageError(f"--sort {','.join(words)}: {problem}", hint=hint)

    def order(row: Row) -> tuple[Any, ...]:
        return bool(row.source), *_row_order(row, columns, table.cells)

    return replace(table, rows=tuple(sorted(table.rows, key=order)))


def get_cell_key(result: Result) -> CellKey:
    """Return the identity of the cell that a result belongs to."""
    return result.checkpoint.weights_sha256, result.checkpoint.key, result.protocol_id


def _last_of_each(results: Iterable[Result], key: Callable[[Result], Hashable]) -> list[Result]:
    """Return the last result of each key, in their order."""
    last: dict[Hashable, Result] = {}
    for result in reversed(list(results)):
        last.setdefault(key(result), result)
    return list(reversed(last.values()))


def _group_by(records: Iterable[Result], key: Callable[[Result], _Key]) -> dict[_Key, list[Result]]:
    """Return the records by their key, both in the order of appearance."""
    groups: defaultdict[_Key, list[Result]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def _make_cell(draws: Sequence[Result], standing: CellStatistics, measures: Sequence[str]) -> Cell:
    ids = tuple(result.id for result in sorted(draws, key=lambda result: result.split.draw))
    statuses = {result.status for result in draws}
    if "damaged" in statuses:
        return Cell(mean=None, std=None, draws=len(draws), status="damaged")
    if "failed" in statuses:
        return Cell(mean=None, std=None, draws=len(draws), status="failed", results=ids)
    scores = [result.metrics.top1 for result in draws if result.metrics is not None]
    mean, std = statistics.fmean(scores), draw_spread(scores)
    status = "not_converged" if "not_converged" in statuses else "ok"
    means = {name: _average(draws, name) for name in measures}
    return Cell(mean=mean, std=std, draws=len(draws), status=status, standing=standing, results=ids, measures=means)


def _average(draws: Sequence[Result], name: str) -> float | None:
    values = [getattr(result.features if hasattr(result.features, name) else result.metrics, name) for result in draws]
    return None if None in values else statistics.fmean(values)


def _add_change(cell: Cell, base: Cell) -> Cell:
    return cell if cell.mean is None or base.mean is None else replace(cell, change=cell.mean - base.mean)


def _make_rows(records: Sequence[Result], refused: Sequence[RefusedCheckpoint]) -> Iterator[Row]:
    networks = _group_by(records, lambda result: get_cell_key(result)[:2])
    checkpoints: dict[Any, Named] = {network: results[0].checkpoint for network, results in networks.items()}
    names = name_networks(checkpoints | {checkpoint.path: checkpoint for checkpoint in refused})
    for failed in refused:
        yield Row(name=names[failed.path], arch="", weights_sha256=None, key=None, note="")
    for network, results in networks.items():
        measured = results[0].checkpoint
        yield Row(
            name=names[network],
            arch=measured.arch,
            weights_sha256=measured.weights_sha256,
            key=measured.key,
            note=_describe_problems(results),
        )


def _describe_problems(results: Sequence[Result]) -> str:
    """Return what is unusual about a network or the images it was given."""
    problems = []
    matched = min(result.checkpoint.matched for result in results)
    if matched < 1:
        problems.append(f"{matched:.1%} of weights loaded")
    if patterns := sorted({pattern for result in results for pattern in result.checkpoint.allow_missing}):
        problems.append(f"absent by --allow-missing {' '.join(patterns)}")
    problems += _list_data_problems(results)
    return ", ".join(problems)


def _list_data_problems(results: Sequence[Result]) -> Iterator[str]:
    """Yield what is unusual about images and features, with the data set where there are several."""
    by_data = _group_by(results, lambda result: result.data.name)
    for name, group in sorted(by_data.items()):
        where = f"{name}: " if len(by_data) > 1 else ""
        if skipped := sorted({result.data.skipped for result in group} - {0}):
            counts = "".join(f"{count} or " for count in skipped[:-1])
            yield f"{where}{counts}{format_count(skipped[-1], 'unreadable image')} skipped"
        yield from (
            f"{where}{text}" for text in sorted({r.features.degenerate for r in group if r.features.degenerate})
        )


def _list_split_notices(records: Sequence[Result]) -> Iterator[str]:
    """Warn of columns whose rows have different labelled images: the same val folder, another train folder."""
    columns = _group_by(records, lambda result: (result.protocol_id, result.split.draw)).values()
    differing = [draws[0] for draws in columns if len({result.split.sha256 for result in draws}) > 1]
    if names := sorted({f"{result.probe.name} {result.split.subset}" for result in differing}):
        yield f"Rows were measured with different labelled images, and are not to be compared: {', '.join(names)}."


def _make_columns(records: Sequence[Result]) -> Iterator[Column]:
    def settings(result: Result) -> str:
        return json.dumps([result.probe.name, *map(result.probe.params.get, _TITLE_PARAMS)])

    protocols = _last_of_each(records, lambda result: result.protocol_id)
    for _, group in sorted(_group_by(protocols, settings).items()):
        bases = _find_bases(group)
        titled = [result for result in group if result.protocol_id not in bases]
        reasons = dict(zip((result.protocol_id for result in titled), _list_reasons(titled), strict=True))
        tests = Counter((bases.get(result.protocol_id), _name_test(result)) for result in group)
        for result in group:
            base, test = bases.get(result.protocol_id), _name_test(result)
            if test and tests[base, test] > 1 and base is not None:
                test += f" {result.protocol_id[:8]}"
            yield Column(
                protocol_id=result.protocol_id,
                probe=result.probe.name,
                params=result.probe.params,
                subset=result.split.subset,
                data=result.data.name,
                images_per_class=result.split.images / (result.data.trained_classes or result.data.classes),
                classes=result.data.classes,
                reason=reasons[base or result.protocol_id],
                test=test,
                base=base,
            )


def _name_test(result: Result) -> str:
    """Return the test set of a record, with the classes that its predictions are restricted to; empty without one."""
    data = result.data
    if data.trained_on is None:
        return ""
    is_restricted = data.trained_classes is not None and data.classes < data.trained_classes
    return f"{data.name} ({data.classes} of {data.trained_classes} classes)" if is_restricted else data.name


def _find_bases(results: Sequence[Result]) -> dict[str, str]:
    """Return, by the id of each test set's protocol, that of the only protocol that is equal but for the images scored."""

    def describe(result: Result, class_map: object) -> str:
        fields = {key: value for key, value in result.protocol.items() if key not in _TEST_FIELDS}
        return json.dumps([fields, class_map], sort_keys=True)

    bases: defaultdict[str, list[str]] = defaultdict(list)
    for result in results:
        if not _name_test(result):
            bases[describe(result, result.data.class_map_sha256)].append(result.protocol_id)
    tests = [
        (result, bases[describe(result, result.protocol.get("trained_on"))]) for result in results if _name_test(result)
    ]
    return {result.protocol_id: candidates[0] for result, candidates in tests if len(candidates) == 1}


def _list_reasons(results: Sequence[Result]) -> list[str]:
    """Return for each protocol of one probe, in words, its data set and the fields in which it differs from the others.

    Fields that a subset determines (its rule, its unreadable images) are shown only where two protocols of the same
    subset differ in them. Manual options, a limit and changes of a recipe are always shown: without them, the number
    would be taken for that of the default protocol. What is not set is never shown.
    """
    protocols = [flatten_fields(result.protocol) for result in results]
    texts = [{key: json.dumps(value) for key, value in protocol.items()} for protocol in protocols]
    by_subset = defaultdict(list)
    for result, protocol in zip(results, texts, strict=True):
        by_subset[result.split.subset, *map(result.probe.params.get, ("lambda", "k"))].append(protocol)

    def differs(key: str) -> bool:
        groups = by_subset.values() if key in _SUBSET_FIELDS else [texts]
        return any(len({text.get(key, "null") for text in group}) > 1 for group in groups)

    shown = {key for text in texts for key in text if key not in _SHOWN_ELSEWHERE and differs(key)}
    shown |= {key for text in texts for key in text if key.startswith(("limit", "by_hand.")) and text[key] != "null"}
    shown |= {f"probe.params.{name}" for result in results for name in _list_unusual_params(result)}
    # The data set's name is always there. A limit and skipped images imply another hash.
    contents = {(result.data.name, text.get("data.sha256")) for result, text in zip(results, texts, strict=True)}
    if "data.sha256" in shown:
        shown -= {"data.class_map_sha256"}
    if shown & {"limit", "skipped"} or len({name for name, _ in contents}) == len(contents):
        shown -= {"data.sha256"}

    def shorten(key: str, value: object) -> object:
        # Eight digits of a hash where these distinguish it from the others.
        values = {str(other.get(key)) for other in protocols}
        is_hash = isinstance(value, str) and len(value) == _HASH_DIGITS
        return str(value)[:8] if is_hash and len({text[:8] for text in values}) == len(values) else value

    def describe(result: Result, protocol: Mapping[str, object]) -> str:
        fields = [
            describe_field(key, shorten(key, protocol[key]))
            for key in sorted(shown, key=_field_order)
            if protocol.get(key) is not None
        ]
        return ", ".join([result.data.trained_on or result.data.name, *fields])

    return list(map(describe, results, protocols))


def describe_field(key: str, value: object) -> str:
    """Return a field of a protocol in words, such as `2 validation images per class` for `limit` and 2."""
    if key in _COUNTED and isinstance(value, int):
        return _WORDS.get(key, "{}").format(format_count(value, _COUNTED[key]))
    if key == "by_hand.patch_drop" and isinstance(value, float):
        return f"{100 * value:.15g} % of patches dropped"
    text = ",".join(f"{item:g}" for item in value) if isinstance(value, list | tuple) else str(value)
    if isinstance(value, float):
        text = f"{value:.15g}"
    name = key.removeprefix("by_hand.").removeprefix("probe.params.")
    return _WORDS.get(key, f"{re.sub('[._]', ' ', name)} {{}}").format(text)


def _field_order(key: str) -> tuple[bool, bool, str]:
    """Return the sort key of fields: what was set manually, the limit, all others."""
    return not key.startswith("by_hand."), key != "limit", key


def _list_unusual_params(result: Result) -> Iterator[str]:
    """Yield the settings that differ from the probe's recipe. Several learning rates are as many protocols."""
    recipe = _RECIPES.get(result.probe.name)
    for name, value in result.probe.params.items():
        default = getattr(recipe, name, value)
        if value != default and [value] != default and f"probe.params.{name}" not in _SHOWN_ELSEWHERE:
            yield name


def _column_order(column: Column) -> tuple[Any, ...]:
    def index(name: str, order: tuple[str, ...]) -> int:
        return order.index(name) if name in order else len(order)

    return (
        index(column.probe, _PROBE_ORDER),
        column.probe,
        sorted((name, value) for name, value in column.params.items() if name not in ("lambda", "k")),
        column.published,
        column.reason,
        *_subset_order(column.subset),
        column.params.get("lambda", 0),
        column.params.get("k", 0),
        column.base is not None,
        column.test,
        column.protocol_id,
    )


def _subset_order(subset: str) -> tuple[int, int, str]:
    """Images per class by their number, then shares by their number, then all images, then lists by their names."""
    size = _SUBSET_SIZE.fullmatch(subset)
    if size is None:
        return 3, 0, subset
    return (2 if size["full"] else 1 if size["unit"] == "pct" else 0), int(size["number"] or 0), subset


def _row_order(row: Row, columns: Sequence[Column], cells: Mapping[tuple[Row, Column], Cell]) -> tuple[Any, ...]:
    """Best first, column by column. Missing and failed cells go last."""
    means = [cells[row, column].mean if (row, column) in cells else None for column in columns]
    return (*(1.0 if mean is None else -mean for mean in means), row.name)
