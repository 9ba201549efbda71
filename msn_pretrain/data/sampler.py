"""Order: which images every step of a run trains on, a pure function of the seed and the step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images that one rank takes at one step, a run of the global batch.

    step, epoch: from 0
    images:      their numbers in the data set
    """

    step: int
    epoch: int
    images: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Order:
    """How the images of a data set follow each other.

    n_images:   of the data set; in every epoch each stands in another place, and those left over behind the last full
                batch are left out
    batch_size: of the global batch, all ranks together
    """

    n_images: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size > self.n_images:
            raise UsageError(
                f"a batch of {self.batch_size} from {self.n_images:,} images",
                hint="Set optimization.batch_size to at most the number of images.",
            )
        if self.batch_size % self.world:
            raise UsageError(
                f"a global batch of {self.batch_size} cannot be shared by {self.world} ranks alike",
                hint="Choose an optimization.batch_size that the number of ranks divides.",
            )

    @property
    def steps_an_epoch(self) -> int:
        return self.n_images // self.batch_size

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Give the numbers of all images in the order of one epoch, the same on every rank."""
        generator = np.random.Generator(np.random.PCG64(seed_at(epoch, seed=self.seed)))
        return generator.permutation(self.n_images)

    def batches(self, first_step: int, steps: int) -> Iterator[Batch]:
        """Give this rank's batches from `first_step` up to `steps`."""
        share = self.batch_size // self.world
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(first_step, steps):
            if step // self.steps_an_epoch != epoch:
                epoch = step // self.steps_an_epoch
                order = self.permutation(epoch)
            start = (step % self.steps_an_epoch) * self.batch_size + self.rank * share
            yield Batch(step=step, epoch=epoch, images=order[start : start + share])


_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_WORDS_A_BLOCK = 4


def philox(counters: NDArray[np.uint64], *, key: int) -> NDArray[np.uint64]:
    """Give four random 32-bit words for each counter, a pure function of counter and key.

    counters: (n, 4), each in [0, 2^32)
    key:      in [0, 2^64)
    returns:  (n, 4), each in [0, 2^32)
    Source: Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    one, two, three, four = (counters[:, word] for word in range(_WORDS_A_BLOCK))
    keys = np.array([key & 0xFFFFFFFF, key >> 32], dtype=np.uint64)
    for _ in range(_ROUNDS):
        left, right = one * _MULTIPLIERS[0], three * _MULTIPLIERS[1]  # below 2^64
        one, three = (right >> _WORD) ^ two ^ keys[0], (left >> _WORD) ^ four ^ keys[1]
        two, four = right & _LOW, left & _LOW
        keys = (keys + _KEY_STEPS) & _LOW
    return np.stack([one, two, three, four], axis=1)


def uniforms(places: NDArray[np.int64], *, seed: int, count: int) -> NDArray[np.float64]:
    """Give `count` numbers in (0, 1) for each place, a pure function of the place and the seed.

    places:  (n, 3) whole numbers, each in [0, 2^32): what the numbers are for, such as (epoch, image, view)
    returns: (n, count)
    """
    blocks = -(-count // _WORDS_A_BLOCK)
    counters = np.empty((len(places), blocks, _WORDS_A_BLOCK), dtype=np.uint64)
    counters[:, :, 0] = np.arange(blocks, dtype=np.uint64)
    counters[:, :, 1:] = places.astype(np.uint64)[:, None]
    words = philox(counters.reshape(-1, _WORDS_A_BLOCK), key=seed % 2**64)
    return (words.reshape(len(places), -1)[:, :count].astype(np.float64) + 0.5) / 2**32


def seed_at(*places: int, seed: int) -> int:
    """Give a seed in [0, 2^63) for one place, for generators that draw in order; up to three numbers in [0, 2^32)."""
    counters = np.zeros((1, _WORDS_A_BLOCK), dtype=np.uint64)
    counters[0, 0] = 0xFFFFFFFF  # a block that `uniforms` never reaches
    counters[0, 1 : 1 + len(places)] = places
    high, low = (int(word) for word in philox(counters, key=seed % 2**64)[0, :2])
    return ((high << 32) | low) >> 1
