"""Finetune recipe: every number that a fine-tuning is made of, as a YAML file's `finetune` section gives it."""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from msn_eval.config.number_range import check_range
from msn_eval.config.recipes import Params


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """How encoder and head are trained. Every field is part of the protocol; what is None is left out of it.

    epochs:              passes over the labelled images
    batch:               images a step, all ranks and accumulated parts together; never more than there are images
    blocks:              last blocks that are trained, with the final norm and the head; 0: these two alone; None: all weights
    head_lambda:         strength of the logistic regression that the head starts from; 0: it starts from zeros
    learning_rate:       of the head after the warm-up; `smallest_rate` at the end of the cosine
    warmup_epochs:       in which the rate rises from 0
    layer_decay:         factor of the learning rate from each layer to the one below it; 1: all alike
    weight_decay:        of AdamW, on tensors that are no vectors; not on class token and positions
    beta2:               of AdamW, whose beta1 is 0.9
    clip:                longest gradient, all weights together; 0: any
    drop_path:           probability that a residual branch of the last block is left out; linear in depth, 0 at the first
    label_smoothing:     share of a label that goes to all classes alike
    mixup, cutmix:       alpha of the Beta distribution that shares are drawn from; 0: none. With both, each step draws one
    crop_share:          smallest share of an image's area that a crop keeps; 1: the evaluation's own transform, no crop
    flip:                probability of a horizontal flip
    randaugment_layers:  operations an image, each applied with probability 1/2
    randaugment_magnitude, randaugment_std: of timm's RandAugment, on its scale of 0 to 10; magnitude 0: none
    erase:               probability that a rectangle of an image is replaced by noise
    """

    epochs: int = 50
    batch: int = 512
    blocks: int | None = None
    head_lambda: float = 0.0
    learning_rate: float = 1e-3
    smallest_rate: float = 1e-6
    warmup_epochs: int = 5
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    beta2: float = 0.999
    clip: float = 0.0
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    crop_share: float = 0.08
    flip: float = 0.5
    randaugment_layers: int = 2
    randaugment_magnitude: int = 9
    randaugment_std: float = 0.5
    erase: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("warmup_epochs", 0), ("blocks", 0)):
            value = getattr(self, name)
            if value is not None:
                check_range(f"finetune.{name}", value, least=least)
        check_range("finetune.learning_rate", self.learning_rate, above=0)
        for name in ("head_lambda", "smallest_rate", "weight_decay", "clip", "mixup", "cutmix", "randaugment_std"):
            check_range(f"finetune.{name}", getattr(self, name), least=0.0)
        for name in ("layer_decay", "crop_share"):
            check_range(f"finetune.{name}", getattr(self, name), above=0.0, most=1.0)
        for name in ("flip", "erase"):
            check_range(f"finetune.{name}", getattr(self, name), least=0.0, most=1.0)
        for name in ("beta2", "drop_path", "label_smoothing"):
            check_range(f"finetune.{name}", getattr(self, name), least=0.0, below=1.0)
        check_range("finetune.randaugment_magnitude", self.randaugment_magnitude, least=0.0, most=10.0)
        check_range("finetune.randaugment_layers", self.randaugment_layers, least=1.0)
        check_range("finetune.warmup_epochs", self.warmup_epochs, below=self.epochs)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def settings(self) -> dict[str, int | float]:
        """Give every number by its name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def differing(self) -> dict[str, int | float]:
        """Give the numbers that are not the defaults."""
        default = FinetuneRecipe()
        return {name: value for name, value in self.settings.items() if value != getattr(default, name)}


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """All weights, or those of the last blocks, and a linear head on the normed CLS token.

    seed: of the order of the images, their augmentation and mixing, and drop path
    """

    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls-norm"

    recipe: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    seed: int = 0

    @property
    def params(self) -> dict[str, int | float]:
        return {**self.recipe.settings, "seed": self.seed}


def recipe_of(settings: Params) -> FinetuneRecipe:
    """Give the recipe that a record's settings tell of; others among them are passed over."""
    known = {one.name for one in fields(FinetuneRecipe)}
    # Each given, since None is left out of the settings and need not be the default.
    given: dict[str, int | float | str | None] = {"blocks": None}
    given |= {name: value for name, value in settings.items() if name in known}
    return FinetuneRecipe(**given)  # type: ignore[arg-type]
