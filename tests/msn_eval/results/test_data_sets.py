"""Averages over data sets, and the tests of their ranks against SciPy and closed forms."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from msn_eval.results.data_sets import DataSetScores, average_data_sets
from msn_eval.results.folder import scan_results
from msn_eval.results.leaderboard import make_leaderboard
from msn_eval.results.record import Result, protocol_id, result_id
from msn_eval.results.statistics import compare_ranks

RunWriter = Callable[..., list[Result]]
Rows = dict[str, list[int]]


def _scores(data: str, right: dict[str, int], n: int = 200) -> DataSetScores:
    """One draw in which a checkpoint is right in the first `right` of n images; 0 stands for a missing result."""
    scores = {(name, None): (np.arange(n) < count).astype(np.int64) for name, count in right.items() if count}
    return DataSetScores(
        data=data,
        names={(name, None): name for name in right},
        accuracies={network: float(row.mean()) for network, row in scores.items()},
        scores=scores,
    )


def test_mean_rank_shares_ranks_within_what_the_paired_test_cannot_separate() -> None:
    columns = [_scores("x", {"a": 180, "b": 178, "c": 100}), _scores("y", {"a": 120, "b": 180, "c": 60})]

    averages = average_data_sets("knn", columns)

    rows = [(row.name, row.rank, row.accuracy) for row in averages.rows]
    assert rows == [("b", 1.25, pytest.approx(0.895)), ("a", 1.75, pytest.approx(0.75)), ("c", 3.0, pytest.approx(0.4))]
    assert (averages.data, averages.p_value, averages.ties) == (("x", "y"), None, ())  # two data sets show nothing


def test_checkpoint_that_is_missing_in_a_data_set_is_left_out_and_named() -> None:
    columns = [_scores("x", {"a": 180, "b": 100, "c": 60}), _scores("y", {"a": 120, "b": 0, "c": 180})]

    averages = average_data_sets("knn", columns)

    assert ([row.name for row in averages.rows], averages.left_out) == (["a", "c"], ("b",))


def test_groups_are_the_runs_of_ranks_that_do_not_differ() -> None:
    columns = [_scores(f"{number}", {"a": 190, "b": 150, "c": 90, "d": 30}) for number in range(8)]

    averages = average_data_sets("knn", columns)

    assert [(row.name, row.rank, row.groups) for row in averages.rows] == [
        ("a", 1.0, "a"), ("b", 2.0, "a b"), ("c", 3.0, "b c"), ("d", 4.0, "c"),
    ]  # fmt: skip
    assert averages.ties == ((0, 1), (1, 2), (2, 3))


def test_without_a_significant_friedman_test_all_are_one_group() -> None:
    columns = [_scores("x", {"a": 190, "b": 150, "c": 90}), _scores("y", {"a": 90, "b": 190, "c": 150})]
    columns.append(_scores("z", {"a": 150, "b": 90, "c": 190}))

    averages = average_data_sets("knn", columns)

    assert (averages.p_value, averages.ties) == (1.0, ((0, 2),))


def _ranks(rows: list[list[float]]) -> NDArray[np.float64]:
    return np.array([stats.rankdata(row) for row in rows])


def test_friedman_test_is_that_of_its_formula_with_correction_for_ties() -> None:
    ranks = _ranks([[3, 1, 1, 4], [2, 1, 3, 4], [1, 2, 3, 3], [2, 1, 3, 4], [1, 1, 1, 4]])
    n, k = ranks.shape
    squares = 12 / (n * k * (k + 1)) * (ranks.sum(axis=0) ** 2).sum() - 3 * n * (k + 1)
    ties = sum(int(count) ** 3 - int(count) for row in ranks for count in np.unique(row, return_counts=True)[1])
    expected = stats.chi2.sf(squares / (1 - ties / (n * (k**3 - k))), k - 1)

    assert compare_ranks(ranks).p_value == pytest.approx(expected, rel=1e-9)


def test_pairs_are_normal_tests_with_holms_correction() -> None:
    ranks = _ranks([[1, 2, 3]] * 7 + [[2, 1, 3]])
    raw = {(0, 1): 0.75, (0, 2): 1.875, (1, 2): 1.125}  # differences of mean ranks
    p = {pair: 2 * stats.norm.sf(gap / np.sqrt(3 * 4 / (6 * 8))) for pair, gap in raw.items()}

    pairs = compare_ranks(ranks).pairs

    assert pairs[0, 2] == pytest.approx(3 * p[0, 2])
    assert pairs[1, 2] == pytest.approx(2 * p[1, 2])
    assert pairs[0, 1] == pytest.approx(p[0, 1])
    assert np.array_equal(pairs, pairs.T)


def test_ranks_that_are_tied_everywhere_differ_nowhere() -> None:
    test = compare_ranks(np.full((4, 3), 2.0))

    assert (test.p_value, test.pairs.min()) == (1.0, 1.0)


def write_data_sets(folder: Path, write_run: RunWriter, accuracies: dict[str, dict[str, float]]) -> Path:
    """Write records of some checkpoints on some data sets by one rule: accuracy by name, by data set."""
    generator = np.random.default_rng(0)
    for number, (data, by_name) in enumerate(accuracies.items()):
        for name, accuracy in by_name.items():

            def moved(result: Result, data: str = data, sha256: str = f"{number}" * 64) -> Result:
                protocol = {**result.protocol, "data": {"sha256": sha256, "class_map_sha256": "c" * 64}}
                key, weights = protocol_id(protocol), result.checkpoint.weights_sha256
                identity = result_id(weights_sha256=weights, key=None, protocol_id=key, draw=result.split.draw)
                info = replace(result.data, name=data, sha256=sha256)
                return replace(
                    result, id=identity, protocol=protocol, protocol_id=key, data=info, predictions=f"{identity}.npz"
                )

            right = generator.random((1, 400)) < accuracy
            write_run(folder, right, name=name, weights=name * 64, changed=moved)
    return folder


def test_protocols_that_differ_in_the_data_set_alone_are_averaged(tmp_path: Path, write_run: RunWriter) -> None:
    folder = write_data_sets(tmp_path, write_run, {data: {"a": 0.9, "b": 0.5, "c": 0.2} for data in ("y", "x", "z")})
    write_run(folder, np.ones((1, 400), dtype=np.bool_), name="a", weights="a" * 64, k=3)  # another rule, one data set

    (averages,) = make_leaderboard(scan_results([folder])).averages

    assert (averages.title, averages.data) == ("knn k=1 T=0.07, 5imgs", ("x", "y", "z"))
    assert [(row.name, row.rank) for row in averages.rows] == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    assert averages.p_value == pytest.approx(stats.friedmanchisquare([1, 1, 1], [2, 2, 2], [3, 3, 3]).pvalue)


def test_one_data_set_has_no_averages(tmp_path: Path, write_run: RunWriter) -> None:
    write_data_sets(tmp_path, write_run, {"x": {"a": 0.9, "b": 0.5}})

    assert make_leaderboard(scan_results([tmp_path])).averages == ()
