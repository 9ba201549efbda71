"""Leaderboard: interval and rank of each cell of a table, computed from the stored predictions."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from msn_eval.errors import format_count
from msn_eval.files.json_records import canonical_json
from msn_eval.results.data_sets import DataSetAverages, DataSetScores, Network, average_data_sets
from msn_eval.results.folder import ResultScan
from msn_eval.results.predictions import name_protocol
from msn_eval.results.record import Result, protocol_id, read_arrays
from msn_eval.results.row_names import name_networks
from msn_eval.results.statistics import Integers, accuracy_interval, count_right, rank_with_ties
from msn_eval.results.table import CellKey, CellStatistics, get_cell_key

_READERS = 4  # prediction files that are unpacked at a time
_MAX_COST = 100_000_000  # images read and compared: a few seconds
_PAIR_COST = 5_000  # of a comparison beside its images, in images
_OF_DATA = ("data", "skipped")  # what differs in a protocol from data set to data set
_Draws = list[tuple[Result, Path]]


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Statistics of cells over test images.

    Attributes:
        standings: Of the cells that have any.
        notices: Why others have none.
        averages: Over data sets, of each rule that was measured on several.
    """

    standings: Mapping[CellKey, CellStatistics]
    notices: tuple[str, ...] = ()
    averages: tuple[DataSetAverages, ...] = ()


def make_leaderboard(scan: ResultScan, *, ranked: bool | None = None) -> Leaderboard:
    """Compute the interval over test images of each cell of the records' table, and its rank in its column.

    The interval of a single draw is the recorded one. Cells that hold all draws of their column, none of them failed, are
    ranked. A column with one checkpoint has no ranks.

    Args:
        scan: The records.
        ranked: Whether to read the predictions. None reads them where that takes seconds.

    Raises:
        DamagedRecordError: Predictions have changed since the scan.
    """
    columns = _group_draws(scan)
    standings = {
        cell_key: CellStatistics(interval=draws[0][0].metrics.top1_ci95)
        for cells in columns
        for cell_key, draws in cells.items()
        if len(draws) == 1 and draws[0][0].metrics is not None
    }
    reason = "were not requested." if ranked is False else ""
    if ranked is None and _estimate_cost(columns) > _MAX_COST:
        reason = "are left out of a table of this size; --ranks adds them."
    if reason:
        return Leaderboard(standings=standings, notices=(f"Ranks, and intervals over several draws, {reason}",))
    names = name_networks({get_cell_key(result)[:2]: result.checkpoint for result in (*scan.results, *scan.damaged)})
    missing = 0
    averages = []
    with ThreadPoolExecutor(_READERS) as readers:
        for title, rule in _group_by_rule(columns).items():
            measured = []
            for cells in rule:
                outcomes = dict(zip(cells, readers.map(_read_scores, cells.values()), strict=True))
                missing += sum(outcome is None for outcome in outcomes.values())
                scores = {cell_key: outcome for cell_key, outcome in outcomes.items() if outcome is not None}
                complete = _list_complete(cells, scores)
                ranks = rank_with_ties([scores[cell_key] for cell_key in complete]) if len(complete) > 1 else ()
                rank_of = dict(zip(complete, ranks, strict=False))
                for cell_key, own in scores.items():
                    bounds = accuracy_interval(own, draws=len(cells[cell_key]))
                    known = standings.get(cell_key, CellStatistics(interval=(bounds.low, bounds.high)))
                    standings[cell_key] = replace(known, rank=rank_of.get(cell_key))
                if len(rule) > 1:
                    own_scores = {cell_key: scores[cell_key] for cell_key in complete}
                    measured.append(_describe_data_set(cells, own_scores, names))
            if measured:
                averages.append(average_data_sets(title, measured))
    notice = f"No rank for {format_count(missing, 'cell')}, whose predictions are missing."
    return Leaderboard(standings=standings, notices=(notice,) if missing else (), averages=tuple(averages))


def _group_by_rule(columns: Iterable[dict[CellKey, _Draws]]) -> dict[str, list[dict[CellKey, _Draws]]]:
    """Group the columns whose protocols differ in nothing but the data set; a second protocol of a data set is alone."""
    groups: defaultdict[str, dict[str, dict[CellKey, _Draws]]] = defaultdict(dict)
    titles: dict[str, str] = {}
    for cells in filter(None, columns):
        (result, _), *_ = next(iter(cells.values()))
        rule = canonical_json({name: value for name, value in result.protocol.items() if name not in _OF_DATA})
        if result.data.trained_on is not None or result.data.name in groups[rule]:  # test sets are not averaged
            rule += result.protocol_id
        groups[rule][result.data.name] = cells
        titles[rule] = name_protocol(result)
    repeated = Counter(titles.values())
    return {
        f"{titles[rule]} #{protocol_id({'rule': rule})[:8]}" if repeated[titles[rule]] > 1 else titles[rule]: [
            by_data[data] for data in sorted(by_data)
        ]
        for rule, by_data in groups.items()
    }


def _describe_data_set(
    cells: Mapping[CellKey, _Draws], scores: Mapping[CellKey, Integers], names: Mapping[Network, str]
) -> DataSetScores:
    results = {cell_key[:2]: [result for result, _ in draws] for cell_key, draws in cells.items()}
    return DataSetScores(
        data=next(iter(results.values()))[0].data.name,
        names={network: names[network] for network in results},
        accuracies={
            network: fmean(result.metrics.top1 for result in draws if result.metrics is not None)
            for network, draws in results.items()
        },
        scores={cell_key[:2]: own for cell_key, own in scores.items()},
    )


def _group_draws(scan: ResultScan) -> list[dict[CellKey, _Draws]]:
    """Return, per protocol, the draws of each cell. Cells with a failed or damaged draw are left out."""
    columns: defaultdict[str, defaultdict[CellKey, _Draws]] = defaultdict(lambda: defaultdict(list))
    damaged = set(map(get_cell_key, scan.damaged))
    for result, path in sorted(zip(scan.results, scan.paths, strict=True), key=lambda pair: pair[0].split.draw):
        if get_cell_key(result) not in damaged:
            columns[result.protocol_id][get_cell_key(result)].append((result, path))
    return [
        {cell_key: draws for cell_key, draws in cells.items() if all(result.metrics is not None for result, _ in draws)}
        for cells in columns.values()
    ]


def _estimate_cost(columns: Sequence[Mapping[CellKey, _Draws]]) -> int:
    cost = 0
    for cells in columns:
        images = max((draws[0][0].data.val_images for draws in cells.values()), default=0)
        cost += sum(map(len, cells.values())) * images + math.comb(len(cells), 2) * (images + _PAIR_COST)
    return cost


def _read_scores(draws: _Draws) -> Integers | None:
    """Return each image's number of right draws, or None where predictions are missing. The scan has checked the files."""
    right = []
    for result, record_path in draws:
        path = record_path.with_name(f"{result.id}.npz")
        if not path.exists():
            return None
        arrays = read_arrays(
            path, ["rank_of_label"], sha256=result.predictions_sha256
        )  # decompressing all takes longer
        right.append(arrays["rank_of_label"] == 1)
    return count_right(np.stack(right))


def _list_complete(cells: Mapping[CellKey, _Draws], scores: Mapping[CellKey, Integers]) -> list[CellKey]:
    """Return the cells that have every draw of their column, and predictions."""
    draws = {cell_key: {result.split.draw for result, _ in pairs} for cell_key, pairs in cells.items()}
    return [cell_key for cell_key in scores if draws[cell_key] == set().union(*draws.values())]
