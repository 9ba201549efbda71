"""Weighted nearest neighbours against a naive loop and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import rank_labels
from msn_eval.probes.knn import NearestNeighbours, neighbour_vote
from msn_eval.probes.knn_search import Search

CPU = torch.device("cpu")


def _features(values: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Features:
    ids = tuple(f"{row:04d}.png" for row in range(len(values)))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=n_classes, tap="cls-norm")


def _clusters(n: int = 90, d: int = 8, n_classes: int = 5) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(n_classes, (n,), generator=generator)
    values = torch.randn(n_classes, d, generator=generator)[labels] + 1.5 * torch.randn(n, d, generator=generator)
    return _features(values, labels, n_classes)


def _queries(d: int = 8) -> torch.Tensor:
    return torch.randn(60, d, generator=torch.Generator().manual_seed(1))


def _predictions(scores: torch.Tensor) -> list[int]:
    return rank_labels(scores, torch.zeros(len(scores), dtype=torch.int64))[0].tolist()


def _only_scores(probe: NearestNeighbours, train: Features, values: torch.Tensor) -> torch.Tensor:
    (scores,) = probe.fit(train, CPU).scores(values)
    return scores


def _naive_votes(train: Features, query: np.ndarray, k: int, temperature: float) -> list[float]:
    bank = train.values.numpy().astype(np.float64)
    query = query.astype(np.float64)
    cosines = [float(np.sum(query * row) / math.hypot(*query) / math.hypot(*row)) for row in bank]
    votes = [0.0] * train.n_classes
    for row in sorted(range(len(bank)), key=lambda row: (-cosines[row], row))[:k]:
        votes[train.labels[row]] += math.exp(cosines[row] / temperature)
    return votes


@pytest.mark.parametrize("search", ["auto", "torch", "faiss"])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("k", [1, 10, 90])
def test_votes_are_those_of_a_naive_float64_loop(k: int, temperature: float, search: Search) -> None:
    train, queries = _clusters(), _queries()

    scores = _only_scores(NearestNeighbours(ks=(k,), temperatures=(temperature,), search=search), train, queries)

    naive = [_naive_votes(train, query, k, temperature) for query in queries.numpy()]
    assert _predictions(scores) == [votes.index(max(votes)) for votes in naive]
    torch.testing.assert_close(scores.exp(), torch.tensor(naive, dtype=torch.float64), rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 10, 90])
def test_predictions_are_those_of_scikit_learn(k: int, temperature: float) -> None:
    train, queries = _clusters(), _queries()
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda far: np.exp((1 - far) / temperature))
    theirs.fit(train.values.numpy(), train.labels.numpy())

    scores = _only_scores(NearestNeighbours(ks=(k,), temperatures=(temperature,)), train, queries)

    assert _predictions(scores) == theirs.predict(queries.numpy()).tolist()
    shares = torch.from_numpy(theirs.predict_proba(queries.numpy())).double()
    torch.testing.assert_close(scores.softmax(dim=1), shares, rtol=0, atol=1e-4)


def test_every_pair_of_k_and_temperature_is_a_setting() -> None:
    probe = NearestNeighbours(ks=(1, 3), temperatures=(0.07, 0.1))

    assert probe.configs(3) == (
        {"k": 1, "temperature": 0.07},
        {"k": 1, "temperature": 0.1},
        {"k": 3, "temperature": 0.07},
        {"k": 3, "temperature": 0.1},
    )


def test_scores_of_every_setting_are_those_of_a_search_of_its_own() -> None:
    train = _clusters()
    probe = NearestNeighbours(ks=(30, 1, 7), temperatures=(0.07, 0.5))

    together = list(probe.fit(train, CPU).scores(_queries()))

    alone = [
        _only_scores(NearestNeighbours(ks=(k,), temperatures=(temperature,)), train, _queries())
        for k in (30, 1, 7)
        for temperature in (0.07, 0.5)
    ]
    assert all(torch.equal(item, other) for item, other in zip(together, alone, strict=True))


def test_default_k_may_equal_the_number_of_images() -> None:
    assert [params["k"] for params in NearestNeighbours().configs(100)] == [10, 20, 100]
    assert [params["k"] for params in NearestNeighbours().configs(200)] == [10, 20, 100, 200]


def test_fewer_images_than_every_default_k_leave_nothing_to_score() -> None:
    fitted = NearestNeighbours().fit(_clusters(9), CPU)

    assert list(fitted.scores(_queries())) == []


def test_a_k_asked_for_above_the_number_of_images_is_a_numerical_error() -> None:
    with pytest.raises(NumericalError) as caught:
        NearestNeighbours(ks=(5, 91), asked=True).fit(_clusters(90), CPU)

    assert str(caught.value) == (
        "k = 91 neighbours among 90 labelled images\nAsk for --k of at most 90, or for a larger subset."
    )


@pytest.mark.parametrize("copies", [2, 50])
def test_of_equal_neighbours_the_earlier_votes(copies: int) -> None:
    train = _clusters()
    values, labels = train.values.clone(), train.labels.clone()
    values[20 : 20 + copies] = train.values[20]
    labels[20], labels[21 : 20 + copies] = 3, 1

    scores = _only_scores(NearestNeighbours(ks=(1,)), _features(values, labels, 5), values[20:21])

    assert _predictions(scores) == [3]


def test_of_classes_with_equal_votes_the_smaller_index_is_predicted() -> None:
    row = _queries()[:1]
    train = _features(row.repeat(6, 1), torch.tensor([4, 2, 1, 2, 4, 1]), 5)

    scores = _only_scores(NearestNeighbours(ks=(6,)), train, row)

    assert scores[0, 1] == scores[0, 2] == scores[0, 4]
    assert _predictions(scores) == [1]


def test_length_of_features_does_not_matter() -> None:
    train = _clusters()
    stretch = torch.linspace(0.01, 100, 90)[:, None]
    plain = _only_scores(NearestNeighbours(ks=(10,)), train, _queries())

    stretched = _only_scores(
        NearestNeighbours(ks=(10,)), _features(train.values * stretch, train.labels, 5), 7 * _queries()
    )

    torch.testing.assert_close(stretched, plain, rtol=1e-5, atol=1e-5)


def test_a_temperature_of_a_thousandth_neither_overflows_nor_loses_a_voter() -> None:
    train = _clusters()

    scores = _only_scores(NearestNeighbours(ks=(90,), temperatures=(0.001,)), train, _queries())

    nearest = _only_scores(NearestNeighbours(ks=(1,)), train, _queries())
    assert scores.isfinite().all()
    assert _predictions(scores) == _predictions(nearest)


def test_a_class_without_votes_scores_minus_infinity() -> None:
    votes = neighbour_vote(
        torch.tensor([[0.5, -0.2]], dtype=torch.float64), torch.tensor([[2, 0]]), n_classes=4, temperature=0.1
    )

    torch.testing.assert_close(votes, torch.tensor([[-2, -torch.inf, 5, -torch.inf]], dtype=torch.float64))
