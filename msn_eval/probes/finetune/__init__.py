"""Fine-tuning of an encoder together with a linear head."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from msn_eval.config.recipes import FinetuneRecipe, Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.probes.base import Probe, TrainsOn


@dataclass(frozen=True, kw_only=True)
class Finetune(Probe):
    """All weights, or those of the last blocks, and a linear head on the normed CLS token.

    Attributes:
        recipe: How they are trained.
        seed: Of the order of the images, their augmentation and mixing, and drop path.
    """

    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 1
    trains_on: ClassVar[TrainsOn] = "images"
    has_probabilities: ClassVar[bool] = True

    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    seed: int = 0

    @property
    def taps(self) -> tuple[str, ...]:
        return ("cls-norm",)

    @property
    def params(self) -> Params:
        return {**self.recipe.settings, "seed": self.seed}

    def configs(self, n: int) -> tuple[Params, ...]:
        return (self.params,)


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[Finetune]:
    """Yield the probe with the recipe and the seed of the options."""
    yield Finetune(recipe=config.finetune, seed=config.seed)
