"""Leaderboard: the interval and the rank that test images give each cell of a table; predictions are read here."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import StoreError
from msn_eval.results.folder import ResultScan
from msn_eval.results.record import Result
from msn_eval.results.statistics import accuracy_interval, count_right, rank_with_ties
from msn_eval.results.table import Place, Standing, place_of

_log = logging.getLogger(__name__)
_AT_ONCE = 4  # prediction files that are unpacked at a time
_MOST_WORK = 100_000_000  # images read and compared: a few seconds
_WORK_OF_A_PAIR = 5_000  # of a comparison beside its images, in images


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """What the images say.

    standings: of the cells whose images could be asked
    notices:   why others have none
    faults:    prediction files that cannot be used
    """

    standings: Mapping[Place, Standing]
    notices: tuple[str, ...] = ()
    faults: tuple[StoreError, ...] = ()


_Draws = list[tuple[Result, Path]]


def make_leaderboard(scan: ResultScan, *, ranked: bool | None = None) -> Leaderboard:
    """Give each cell of the records' table its interval over test images, and its rank in its column.

    ranked: None asks the predictions where that takes seconds; with False none are read
    The interval of a single draw is the recorded one. Ranked are the cells that hold all draws of their column, none of them
    failed. A column of one checkpoint has no ranks.
    """
    columns = _columns(scan)
    recorded = {
        place: Standing(interval=draws[0][0].metrics.top1_ci95)
        for cells in columns.values()
        for place, draws in cells.items()
        if len(draws) == 1 and draws[0][0].metrics is not None
    }
    if ranked is False:
        return Leaderboard(
            standings=recorded, notices=("Ranks, and intervals over several draws, were not asked for.",)
        )
    if ranked is None and _work(columns) > _MOST_WORK:
        left_out = (
            "Ranks, and intervals over several draws, are left out of a table of this size; --ranks asks for them."
        )
        return Leaderboard(standings=recorded, notices=(left_out,))
    standings, faults, absent = dict(recorded), [], 0
    with ThreadPoolExecutor(_AT_ONCE) as readers:
        for cells in columns.values():
            scores: dict[Place, NDArray[np.int64]] = {}
            for place, read in zip(cells, readers.map(_read_scores, cells.values()), strict=True):
                absent += read is None
                if isinstance(read, StoreError):
                    faults.append(read)
                elif read is not None:
                    scores[place] = read
            standings |= _stand(cells, scores, recorded)
    missing = f"The predictions of {absent} cells are not beside their records: they have no rank."
    return Leaderboard(standings=standings, notices=(missing,) if absent else (), faults=tuple(faults))


def _columns(scan: ResultScan) -> dict[str, dict[Place, _Draws]]:
    """Give the records by protocol and cell, cells with a failed draw left out."""
    columns: defaultdict[str, defaultdict[Place, _Draws]] = defaultdict(lambda: defaultdict(list))
    for result, path in sorted(zip(scan.results, scan.paths, strict=True), key=lambda pair: pair[0].split.draw):
        columns[result.protocol_id][place_of(result)].append((result, path))
    return {
        protocol: {place: draws for place, draws in cells.items() if all(one.metrics is not None for one, _ in draws)}
        for protocol, cells in columns.items()
    }


def _work(columns: Mapping[str, Mapping[Place, _Draws]]) -> int:
    work = 0
    for cells in columns.values():
        images = max((draws[0][0].data.val_images for draws in cells.values()), default=0)
        pairs = len(cells) * (len(cells) - 1) // 2
        work += sum(map(len, cells.values())) * images + pairs * (images + _WORK_OF_A_PAIR)
    return work


def _read_scores(draws: _Draws) -> NDArray[np.int64] | StoreError | None:
    """Give in how many draws each image is right, why that cannot be told, or None where predictions are not there."""
    right = []
    for result, path in draws:
        beside = path.with_name(f"{result.id}.npz")
        if not beside.exists():
            return None
        try:
            with beside.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                ranks = stored["rank_of_label"]  # the one array that is needed
        except Exception as error:  # zipfile, zlib and NumPy each have their own kinds
            return StoreError(f"are no readable predictions: {error}", where=str(beside))
        images = result.metrics.n if result.metrics else 0
        if ranks.shape != (images,) or int((ranks == 1).sum()) != round(
            (result.metrics.top1 if result.metrics else 0) * images
        ):
            return StoreError(
                "are not the predictions that the record tells of; see msn-eval verify", where=str(beside)
            )
        right.append(ranks == 1)
    return count_right(np.stack(right))


def _stand(
    cells: Mapping[Place, _Draws], scores: Mapping[Place, NDArray[np.int64]], recorded: Mapping[Place, Standing]
) -> dict[Place, Standing]:
    """Give interval and rank of the cells of one column whose predictions were read."""
    drawn = {place: tuple(result.split.draw for result, _ in draws) for place, draws in cells.items()}
    everything = tuple(sorted({draw for draws in drawn.values() for draw in draws}))
    whole = [place for place in scores if drawn[place] == everything]
    ranks = dict(_ranks(whole, scores)) if len(whole) > 1 else {}
    standings = {}
    for place, own in scores.items():
        if place in recorded:
            interval = recorded[place].interval
        else:
            bounds = accuracy_interval(own, draws=len(drawn[place]))
            interval = (bounds.low, bounds.high)
        standings[place] = Standing(interval=interval, rank=ranks.get(place))
    return standings


def _ranks(places: Sequence[Place], scores: Mapping[Place, NDArray[np.int64]]) -> Iterator[tuple[Place, int]]:
    return zip(places, rank_with_ties([scores[place] for place in places]), strict=True)
