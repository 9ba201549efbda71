"""Order: which images every step of a run trains on, a pure function of the seed and the step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import UsageError
from msn_pretrain.data.philox import seed_at


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
                remedy="Set optimization.batch_size to at most the number of images.",
            )
        if self.batch_size % self.world:
            raise UsageError(
                f"a global batch of {self.batch_size} cannot be shared by {self.world} ranks alike",
                remedy="Choose an optimization.batch_size that the number of ranks divides.",
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
