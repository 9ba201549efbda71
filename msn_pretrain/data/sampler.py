"""Sampling order, and stateless random numbers: pure functions of the seed and what the numbers are for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import UsageError, format_count


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images of one rank at one step: consecutive images of the global batch.

    Attributes:
        step: From 0.
        epoch: From 0.
        images: (b,) indices in the data set.
    """

    step: int
    epoch: int
    images: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the images. Each epoch has its own permutation; images after the last full batch are skipped.

    Attributes:
        n_images: Images of the data set.
        batch_size: Images of the global batch, all ranks together.
        seed: Seed of the permutations.
        rank: This rank.
        world: Number of ranks.
    """

    n_images: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size > self.n_images:
            what = f"a batch of {self.batch_size} images is impossible with {format_count(self.n_images, 'image')}"
            raise UsageError(what, hint="Set optimization.batch_size to at most the number of images.")
        if self.batch_size % self.world:
            what = f"a global batch of {self.batch_size} cannot be divided by {self.world} ranks"
            raise UsageError(what, hint="Set optimization.batch_size to a multiple of the number of ranks.")

    @property
    def steps_per_epoch(self) -> int:
        return self.n_images // self.batch_size

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices of all images in the order of one epoch, the same on every rank."""
        generator = np.random.Generator(np.random.PCG64(seed_at(epoch, seed=self.seed)))
        return generator.permutation(self.n_images)

    def batches(self, first_step: int, steps: int) -> Iterator[Batch]:
        """Yield this rank's batches from `first_step` to `steps - 1`."""
        share = self.batch_size // self.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(first_step, steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = self.permutation(epoch)
            start = (step % self.steps_per_epoch) * self.batch_size + self.rank * share
            yield Batch(step=step, epoch=epoch, images=order[start : start + share])


_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_WORDS_PER_BLOCK = 4


def philox(counters: NDArray[np.uint64], *, key: int) -> NDArray[np.uint64]:
    """Compute four random 32-bit words for each counter.

    NumPy's Philox has 64-bit words; these draws are part of what a seed means, so they stay.

    Args:
        counters: (n, 4), each in [0, 2^32).
        key: In [0, 2^64).

    Returns:
        (n, 4), each in [0, 2^32).

    Source: Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    w0, w1, w2, w3 = (counters[:, word] for word in range(_WORDS_PER_BLOCK))
    keys = np.array([key & 0xFFFFFFFF, key >> 32], dtype=np.uint64)
    for _ in range(_ROUNDS):
        left, right = w0 * _MULTIPLIERS[0], w2 * _MULTIPLIERS[1]  # products of 32-bit words fit into 64 bits
        w0, w2 = (right >> _WORD) ^ w1 ^ keys[0], (left >> _WORD) ^ w3 ^ keys[1]
        w1, w3 = right & _LOW, left & _LOW
        keys = (keys + _KEY_STEPS) & _LOW
    return np.stack([w0, w1, w2, w3], axis=1)


def uniforms(keys: NDArray[np.int64], *, seed: int, count: int) -> NDArray[np.float64]:
    """Draw `count` uniform numbers in (0, 1) for each key.

    Args:
        keys: (n, 3) integers in [0, 2^32): what the numbers are for, such as (epoch, image, view).
        seed: The seed.
        count: Numbers per key.

    Returns:
        (n, count).
    """
    blocks = -(-count // _WORDS_PER_BLOCK)
    counters = np.empty((len(keys), blocks, _WORDS_PER_BLOCK), dtype=np.uint64)
    counters[:, :, 0] = np.arange(blocks, dtype=np.uint64)
    counters[:, :, 1:] = keys.astype(np.uint64)[:, None]
    words = philox(counters.reshape(-1, _WORDS_PER_BLOCK), key=seed % 2**64)
    return (words.reshape(len(keys), -1)[:, :count].astype(np.float64) + 0.5) / 2**32


def seed_at(*keys: int, seed: int) -> int:
    """Derive a seed in [0, 2^63) from up to three integers in [0, 2^32), for generators that draw in order."""
    counters = np.zeros((1, _WORDS_PER_BLOCK), dtype=np.uint64)
    counters[0, 0] = 0xFFFFFFFF  # a block that `uniforms` never reaches
    counters[0, 1 : 1 + len(keys)] = keys
    high, low = (int(word) for word in philox(counters, key=seed % 2**64)[0, :2])
    return ((high << 32) | low) >> 1
