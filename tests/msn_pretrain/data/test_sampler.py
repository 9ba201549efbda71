import numpy as np
import pytest
from scipy.stats import kstest

from msn_eval.errors import UsageError
from msn_pretrain.data.sampler import Order, philox, seed_at, uniforms


def _images(order: Order, first: int, steps: int) -> list[list[int]]:
    return [batch.images.tolist() for batch in order.batches(first, steps)]


def test_ranks_share_the_batches_of_a_single_one() -> None:
    alone = _images(Order(n_images=50, batch_size=12, seed=4), 0, 9)

    shares = [_images(Order(n_images=50, batch_size=12, seed=4, rank=rank, world=3), 0, 9) for rank in range(3)]

    assert [[image for share in shares for image in share[step]] for step in range(9)] == alone


def test_later_start_gives_the_same_batches() -> None:
    order = Order(n_images=50, batch_size=12, seed=4)

    assert _images(order, 6, 9) == _images(order, 0, 9)[6:]


def test_an_epoch_sees_no_image_twice_and_the_next_one_another_order() -> None:
    order = Order(n_images=50, batch_size=12, seed=4)

    first, second = ([image for batch in _images(order, start, start + 4) for image in batch] for start in (0, 4))

    assert len(set(first)) == len(set(second)) == 48
    assert first != second
    assert [batch.epoch for batch in order.batches(0, 9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_order_of_an_epoch_is_stable() -> None:
    assert Order(n_images=8, batch_size=8, seed=0).permutation(3).tolist() == [5, 7, 4, 2, 6, 1, 0, 3]


@pytest.mark.parametrize(("batch_size", "world"), [(51, 1), (12, 5)])
def test_impossible_batch_size_is_refused(batch_size: int, world: int) -> None:
    with pytest.raises(UsageError):
        Order(n_images=50, batch_size=batch_size, seed=0, world=world)


def test_philox_gives_the_published_words() -> None:
    counters = np.array([[0, 0, 0, 0], [0xFFFFFFFF] * 4], dtype=np.uint64)

    zeros, ones = philox(counters[:1], key=0)[0], philox(counters[1:], key=2**64 - 1)[0]

    assert [f"{word:08x}" for word in zeros] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{word:08x}" for word in ones] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_numbers_depend_only_on_their_keys() -> None:
    keys = np.array([[0, 1, 2], [3, 4, 5], [0, 1, 3]])

    together, backwards = uniforms(keys, seed=7, count=9), uniforms(keys[::-1], seed=7, count=9)

    assert np.array_equal(together, backwards[::-1])
    assert len(np.unique(together)) == together.size


def test_numbers_are_uniform_over_images() -> None:
    images = np.arange(20_000)
    keys = np.stack([np.zeros_like(images), images, np.zeros_like(images)], axis=1)

    values = uniforms(keys, seed=0, count=6)

    assert all(kstest(values[:, column], "uniform").pvalue > 1e-3 for column in range(6))
    assert abs(np.corrcoef(values.T) - np.eye(6)).max() < 0.04


def test_seeds_of_neighbouring_keys_differ() -> None:
    seeds = {seed_at(epoch, rank, seed=seed) for epoch in range(20) for rank in range(8) for seed in range(3)}

    assert len(seeds) == 480
