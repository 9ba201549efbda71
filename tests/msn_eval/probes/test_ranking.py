import numpy as np
import pytest
import torch

from msn_eval.errors import NumericalError
from msn_eval.probes.ranking import rank_labels


def _naive_order(scores: torch.Tensor) -> np.ndarray:
    return np.argsort(-scores.numpy(), axis=1, kind="stable")


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_predictions_and_ranks_are_those_of_a_stable_sort(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (300, 7), generator=generator).double()
    labels = torch.randint(7, (300,), generator=generator)

    prediction, rank = rank_labels(scores, labels)

    order = _naive_order(scores)
    assert prediction.tolist() == order[:, 0].tolist()
    assert rank.tolist() == [row.tolist().index(label) + 1 for row, label in zip(order, labels.tolist(), strict=True)]


def test_equal_scores_rank_by_smaller_class_index() -> None:
    scores = torch.tensor([[0.2, 0.7, 0.7, 0.7]]).repeat(4, 1)

    prediction, rank = rank_labels(scores, torch.arange(4))

    assert prediction.tolist() == [1, 1, 1, 1]
    assert rank.tolist() == [4, 1, 2, 3]


def test_a_label_is_predicted_exactly_where_it_ranks_first() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (200, 5), generator=generator).double()
    labels = torch.randint(5, (200,), generator=generator)

    prediction, rank = rank_labels(scores, labels)

    assert torch.equal(prediction == labels, rank == 1)


def test_classes_that_cannot_be_chosen_rank_last() -> None:
    scores = torch.tensor([[-torch.inf, -1e300, -torch.inf, 0.5]], dtype=torch.float64).repeat(4, 1)

    prediction, rank = rank_labels(scores, torch.arange(4))

    assert prediction.tolist() == [3, 3, 3, 3]
    assert rank.tolist() == [3, 2, 4, 1]


def test_float64_scores_are_not_rounded_into_ties() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)

    prediction, _ = rank_labels(scores, torch.tensor([0]))

    assert prediction.tolist() == [1]


def test_nan_is_refused_wherever_it_stands() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan

    with pytest.raises(NumericalError) as caught:
        rank_labels(scores, torch.zeros(3, dtype=torch.int64))

    assert str(caught.value) == ("scores are NaN\nThe features or the fit overflowed; retry with --precision fp32.")
