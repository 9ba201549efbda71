"""Nearest class mean against its closed form."""

import numpy as np
import torch
from scipy.spatial.distance import cdist

from msn_eval.features.extraction import Features
from msn_eval.probes.base import normalise_rows, rank_labels
from msn_eval.probes.ncm import NearestClassMean, class_directions

CPU = torch.device("cpu")


def _features(values: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Features:
    ids = tuple(f"{row:04d}.png" for row in range(len(values)))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=n_classes, tap="cls-norm")


def _clusters() -> Features:
    generator = torch.Generator().manual_seed(0)
    return _features(torch.randn(40, 8, generator=generator) + 0.5, torch.arange(40) % 4, 4)


def _queries() -> torch.Tensor:
    return torch.randn(30, 8, generator=torch.Generator().manual_seed(1))


def _scores(train: Features, values: torch.Tensor) -> torch.Tensor:
    (scores,) = NearestClassMean().fit(train, CPU).scores(values)
    return scores


def test_scores_are_the_cosines_to_the_means_of_normalised_rows() -> None:
    train = _clusters()
    rows = train.values.numpy().astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    means = np.stack([rows[train.labels.numpy() == label].mean(axis=0) for label in range(4)])

    scores = _scores(train, _queries())

    np.testing.assert_allclose(scores.numpy(), 1 - cdist(_queries().double().numpy(), means, "cosine"), atol=1e-14)


def test_a_class_without_images_is_never_chosen() -> None:
    train = _features(torch.tensor([[1.0, 0.0], [0.9, 0.1]]), torch.tensor([1, 2]), 4)

    scores = _scores(train, torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))

    prediction, rank = rank_labels(scores, torch.tensor([0, 3]))
    assert prediction.tolist() == [2, 1]
    assert rank.tolist() == [3, 4]


def test_a_class_whose_rows_cancel_scores_zero() -> None:
    train = _features(torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]), 2)

    scores = _scores(train, torch.tensor([[3.0, 4.0]]))

    torch.testing.assert_close(scores, torch.tensor([[0.0, 0.8]], dtype=torch.float64))


def test_a_class_whose_rows_cancel_but_for_rounding_points_nowhere() -> None:
    row = normalise_rows(torch.randn(1, 20, generator=torch.Generator().manual_seed(0)))
    rows, labels = torch.cat([row, row.repeat(7, 1), -row.repeat(7, 1)]), torch.tensor([0] + [1] * 14)
    assert torch.zeros(1, 20).double().index_add_(0, labels[1:] - 1, rows[1:]).any()  # or there is nothing to test

    directions = class_directions(rows, labels, n_classes=2)

    assert not directions[1].any()


def test_a_class_whose_rows_nearly_cancel_points_along_the_rest() -> None:
    train = _features(torch.tensor([[1.0, 1e-7], [-1.0, 1e-7], [1.0, 0.0]]), torch.tensor([0, 0, 1]), 2)

    scores = _scores(train, torch.tensor([[0.0, 2.0]]))

    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_a_zero_row_counts_as_no_direction() -> None:
    train = _features(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]), 2)

    scores = _scores(train, torch.tensor([[1.0, 0.0]]))

    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
