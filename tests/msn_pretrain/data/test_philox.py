import numpy as np
from scipy.stats import kstest

from msn_pretrain.data.philox import philox, seed_at, uniforms


def test_words_are_those_that_the_authors_publish() -> None:
    counters = np.array([[0, 0, 0, 0], [0xFFFFFFFF] * 4], dtype=np.uint64)

    zeros, ones = philox(counters[:1], key=0)[0], philox(counters[1:], key=2**64 - 1)[0]

    assert [f"{word:08x}" for word in zeros] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{word:08x}" for word in ones] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_numbers_depend_on_their_place_alone() -> None:
    places = np.array([[0, 1, 2], [3, 4, 5], [0, 1, 3]])

    together, backwards = uniforms(places, seed=7, count=9), uniforms(places[::-1], seed=7, count=9)

    assert np.array_equal(together, backwards[::-1])
    assert len(np.unique(together)) == together.size


def test_numbers_are_uniform_over_images() -> None:
    images = np.arange(20_000)
    places = np.stack([np.zeros_like(images), images, np.zeros_like(images)], axis=1)

    values = uniforms(places, seed=0, count=6)

    assert all(kstest(values[:, column], "uniform").pvalue > 1e-3 for column in range(6))
    assert abs(np.corrcoef(values.T) - np.eye(6)).max() < 0.04


def test_seeds_of_neighbouring_places_differ() -> None:
    seeds = {seed_at(epoch, rank, seed=seed) for epoch in range(20) for rank in range(8) for seed in range(3)}

    assert len(seeds) == 480
