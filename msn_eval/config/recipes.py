"""Probe recipes: how probes are trained that have more to them than one number; the fields of a config's sections."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from msn_eval.config.yaml_config import check_range
from msn_eval.errors import UsageError, did_you_mean

TAP_NAMES = ("cls", "cls-norm", "mean", "cls4", "pool", "out", "pixels")
Params = Mapping[str, int | float | str]  # a probe's settings, as they stand in protocols and records


@dataclass(frozen=True, kw_only=True)
class LinearRecipe:
    """A grid of linear layers, each field part of the protocol; the layer is chosen from the labelled images alone.

    taps:           where the encoder is tapped; of several, each with a grid of its own, the labelled images choose one too
    lr:             the one learning rate, trained at `weight_decay` without any choice; None for the grid
    weight_decay:   beside `lr` alone
    lr_first, lr_last, lrs: ends and number of the grid's learning rates, in equal ratios; the same of weight decays
    seeds:          held-out tenths, each with an order of its own, over which a layer's accuracy is averaged
    seed:           of the first of them, and of the final training
    """

    taps: list[str] = field(default_factory=lambda: ["cls"])
    lr: float | None = None
    weight_decay: float = 0.0
    lr_first: float = 0.1
    lr_last: float = 1000.0
    lrs: int = 13
    weight_decay_first: float = 1e-7
    weight_decay_last: float = 1e-3
    weight_decays: int = 3
    epochs: int = 100
    batch_size: int = 256
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.taps:
            raise UsageError("linear.taps: nothing given", hint=f"Name one or several of {', '.join(TAP_NAMES)}.")
        for tap in self.taps:
            if tap not in TAP_NAMES:
                raise UsageError(
                    f"linear.taps: there is no tap {tap!r}.{did_you_mean(tap, TAP_NAMES)}",
                    hint=f"Known: {', '.join(TAP_NAMES)}.",
                )
        for name in ("lr_first", "lr_last", "weight_decay_first", "weight_decay_last"):
            check_range(f"linear.{name}", getattr(self, name), above=0)
        if self.lr is not None:
            check_range("linear.lr", self.lr, above=0)
        check_range("linear.weight_decay", self.weight_decay, least=0)
        for name in ("lrs", "weight_decays", "epochs", "batch_size", "seeds"):
            check_range(f"linear.{name}", getattr(self, name), least=1)
        check_range("linear.seed", self.seed, least=0)

    @property
    def named_taps(self) -> tuple[str, ...]:
        """Give the taps asked for, each once, in one order whatever the user's; none where the probe's own rule holds."""
        return tuple(tap for tap in TAP_NAMES if tap in self.taps) if set(self.taps) != {"cls"} else ()

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Give the learning rates to choose from, rising where the ends do."""
        return (self.lr,) if self.lr is not None else _in_equal_ratios(self.lr_first, self.lr_last, self.lrs)

    @property
    def decays(self) -> tuple[float, ...]:
        """Give the weight decays to choose from."""
        if self.lr is not None:
            return (self.weight_decay,)
        return _in_equal_ratios(self.weight_decay_first, self.weight_decay_last, self.weight_decays)


def linear_recipe_of(settings: Params) -> LinearRecipe:
    """Give the recipe that a record's settings tell of."""
    given: dict[str, Any] = dict(settings)
    if "taps" in given:
        given["taps"] = given["taps"].split(",")
    return LinearRecipe(**given)


@dataclass(frozen=True, kw_only=True)
class AugmentedRecipe:
    """How linear layers are trained on augmented images; each field is part of the protocol, each learning rate one by itself.

    lr:           at the first step, falling to 0 along a cosine over all steps
    weight_decay: on the layer's weights; biases and the norm are left alone
    batch_size:   images a step, all ranks and accumulated parts together; never more than there are
    crop_share:   smallest share of an image's area that a crop keeps
    seed:         of the first weights, the order of images, and every image's crops and flips
    """

    lr: list[float] = field(default_factory=lambda: [6.4])
    weight_decay: float = 0.0
    epochs: int = 100
    batch_size: int = 16384
    crop_share: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lr:
            raise UsageError("linear_augmented.lr: nothing given", hint="Name at least one learning rate.")
        for rate in self.lr:
            check_range("linear_augmented.lr", rate, above=0)
        check_range("linear_augmented.weight_decay", self.weight_decay, least=0)
        for name in ("epochs", "batch_size"):
            check_range(f"linear_augmented.{name}", getattr(self, name), least=1)
        check_range("linear_augmented.crop_share", self.crop_share, above=0, most=1)
        check_range("linear_augmented.seed", self.seed, least=0)


def _in_equal_ratios(first: float, last: float, count: int) -> tuple[float, ...]:
    """Give `count` numbers from `first` to `last`, both ends exact, rounded to six digits between them."""
    if count == 1:
        return (first,)
    steps = (first * (last / first) ** (place / (count - 1)) for place in range(1, count - 1))
    return (first, *(float(f"{one:.6g}") for one in steps), last)


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


def recipe_of(settings: Params) -> FinetuneRecipe:
    """Give the recipe that a record's settings tell of; others among them are passed over."""
    known = {one.name for one in fields(FinetuneRecipe)}
    # Each given, since None is left out of the settings and need not be the default.
    given: dict[str, int | float | str | None] = {"blocks": None}
    given |= {name: value for name, value in settings.items() if name in known}
    return FinetuneRecipe(**given)  # type: ignore[arg-type]
