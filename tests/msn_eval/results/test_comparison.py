"""Comparison of two checkpoints: outcome and words follow from the images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_eval.errors import ComparisonError, StoreError
from msn_eval.results.comparison import Comparison, compare, find_nearest_protocol, list_protocol_differences
from msn_eval.results.folder import list_results
from msn_eval.results.record import Result

RunWriter = Callable[..., list[Result]]
_BEFORE = np.array([[True] * 60 + [False] * 40] * 2)


def _compare(a: Path, b: Path) -> Comparison:
    return compare(list_results([a]), list_results([b]), ([a], [b]))


@pytest.fixture
def compared(write_run: RunWriter, tmp_path: Path) -> Comparison:
    """Compare with a checkpoint that lost 20 ants in both draws and gained one bee in the first draw."""
    after = _BEFORE.copy()
    after[:, 5:25] = False
    after[0, 99] = True
    write_run(tmp_path / "a", _BEFORE)
    write_run(tmp_path / "b", after, weights="b" * 64)
    return _compare(tmp_path / "a", tmp_path / "b")


def test_significant_drop_is_worse_and_states_its_size(compared: Comparison) -> None:
    (one,) = compared.protocols

    assert (one.outcome, one.words) == ("worse", "the second is worse by 19.50 points")
    assert one.paired.difference == pytest.approx(-0.195)
    assert one.paired.interval.low < -0.195 < one.paired.interval.high < 0


def test_flipped_images_are_listed_lost_ones_first(compared: Comparison) -> None:
    flips = compared.protocols[0].flips

    assert len(flips) == 21
    assert (flips[0].image, flips[0].first, flips[0].second) == ("ant/00005.png", 2, 0)
    assert (flips[-1].image, flips[-1].first, flips[-1].second) == ("bee/00099.png", 0, 1)


def test_changed_classes_are_listed_most_changed_first(compared: Comparison) -> None:
    assert [(one.name, one.images, one.first, one.second) for one in compared.protocols[0].classes] == [
        ("ant", 50, 1.0, 0.6),
        ("bee", 50, 0.2, 0.21),
    ]


def test_spread_over_draws_and_interval_over_images_are_separate(compared: Comparison) -> None:
    first, second = compared.protocols[0].first, compared.protocols[0].second

    assert (first.spread, second.spread) == (0.0, pytest.approx(np.std([0.41, 0.40], ddof=1)))
    assert first.interval.low < 0.6 < first.interval.high


def test_small_difference_is_not_separable_and_states_the_detectable_one(write_run: RunWriter, tmp_path: Path) -> None:
    after = _BEFORE.copy()
    after[:, 0] = False
    write_run(tmp_path / "a", _BEFORE)
    write_run(tmp_path / "b", after, weights="b" * 64)

    (one,) = _compare(tmp_path / "a", tmp_path / "b").protocols

    assert one.outcome == "not separable"
    assert one.words.startswith(f"not separable: a true difference of {100 * one.detectable:.2f} points or more would")


def test_equal_predictions_and_equally_right_images_are_distinguished(write_run: RunWriter, tmp_path: Path) -> None:
    write_run(tmp_path / "a", _BEFORE)
    write_run(tmp_path / "b", _BEFORE, weights="b" * 64, wrong_class=2)

    assert _compare(tmp_path / "a", tmp_path / "a").protocols[0].words == "the same predictions"
    assert _compare(tmp_path / "a", tmp_path / "b").protocols[0].words == "right on the same images"


def test_only_common_draws_are_compared(write_run: RunWriter, tmp_path: Path) -> None:
    write_run(tmp_path / "a", _BEFORE)
    write_run(tmp_path / "b", _BEFORE[:1], weights="b" * 64)

    (one,) = _compare(tmp_path / "a", tmp_path / "b").protocols
    assert (one.draws, one.first.accuracy, one.second.accuracy) == ((1,), 0.6, 0.6)


def test_unconverged_fit_is_mentioned_in_the_words(write_run: RunWriter, tmp_path: Path) -> None:
    write_run(tmp_path / "a", _BEFORE)
    write_run(tmp_path / "b", ~_BEFORE, weights="b" * 64, changed=lambda one: replace(one, status="not_converged"))

    (one,) = _compare(tmp_path / "a", tmp_path / "b").protocols
    assert one.words.endswith("doubtful, since the solver did not converge for the second")


def test_protocols_of_one_side_are_listed_with_the_reason(write_run: RunWriter, tmp_path: Path) -> None:
    write_run(tmp_path / "a", _BEFORE)
    write_run(tmp_path / "a", _BEFORE, k=5)
    write_run(tmp_path / "b", _BEFORE, weights="b" * 64)
    write_run(tmp_path / "b", _BEFORE, weights="b" * 64, k=7)

    left_out = dict(_compare(tmp_path / "a", tmp_path / "b").left_out)

    assert len(left_out) == 2
    assert "the second has no result under it; nearest: probe.params.k: 5 -> 7" in left_out.values()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda one: replace(one, split=replace(one.split, sha256="9" * 64)), "fitted to different labelled images"),
        (lambda one: replace(one, status="failed", metrics=None, error="broken"), "FAILED: broken"),
    ],
)
def test_nothing_to_compare_is_an_error(
    write_run: RunWriter, tmp_path: Path, changed: Callable[[Result], Result], message: str
) -> None:
    write_run(tmp_path / "a", _BEFORE)
    write_run(tmp_path / "b", _BEFORE, weights="b" * 64, changed=changed)

    with pytest.raises(ComparisonError, match=message):
        _compare(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("structures", "is_refused"), [(("a", "a"), False), (("a", "b"), True), ((None, "a"), True), ((None, None), True)]
)
def test_same_weights_in_another_network_are_refused_and_in_another_spelling_compared(
    write_run: RunWriter, tmp_path: Path, structures: tuple[str | None, str | None], is_refused: bool
) -> None:
    for name, structure in zip(("vit_a", "vit_b"), structures, strict=True):

        def respell(one: Result, arch: str = name, structure: str | None = structure) -> Result:
            return replace(one, checkpoint=replace(one.checkpoint, arch=arch, structure_sha256=structure))

        write_run(tmp_path / name, _BEFORE, changed=respell)

    if is_refused:
        with pytest.raises(StoreError, match="same weights, read differently: architecture: vit_a -> vit_b"):
            _compare(tmp_path / "vit_a", tmp_path / "vit_b")
    else:
        assert _compare(tmp_path / "vit_a", tmp_path / "vit_b").protocols[0].words == "the same predictions"


def test_differences_have_dotted_paths_and_short_hashes() -> None:
    first = {"data": {"sha256": "a" * 64}, "limit": None, "same": 1}
    second = {"data": {"sha256": "a" * 63 + "b"}, "limit": 5, "same": 1, "new": True}

    assert list_protocol_differences(first, second) == [
        "data.sha256: aaaaaaaaaaaa -> aaaaaaaaaaaa",
        "limit: None -> 5",
        "new: (none) -> True",
    ]


def test_nearest_protocol_has_the_fewest_differences() -> None:
    assert find_nearest_protocol({"a": 1, "b": 1}, [{"a": 2, "b": 2}, {"a": 1, "b": 3}]) == ["b: 1 -> 3"]
    assert find_nearest_protocol({"a": 1}, []) == []
