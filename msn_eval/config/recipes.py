"""Recipes: the settings of probes that have more than one number, as sections of a config file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msn_eval.config.yaml_config import check_choice, check_ranges
from msn_eval.errors import UsageError

TAP_NAMES = ("cls", "cls-norm", "mean", "cls4", "pool", "out", "pixels")
Params = Mapping[str, int | float | str]  # a probe's settings, as in protocols and records


@dataclass(frozen=True, kw_only=True)
class LinearRecipe:
    """A grid of linear layers. Every field is part of the protocol; the layer is chosen from the labelled images alone.

    Attributes:
        taps: Taps of the encoder. Of several, each with a grid of its own, the labelled images choose one too.
        lr: The only learning rate, used with `weight_decay` without any choice; None for the grid.
        weight_decay: Used with `lr` only.
        lr_first: First learning rate of the grid.
        lr_last: Last learning rate of the grid.
        lrs: Number of learning rates, in equal ratios.
        weight_decay_first: First weight decay of the grid.
        weight_decay_last: Last weight decay of the grid.
        weight_decays: Number of weight decays, in equal ratios.
        epochs: Passes over the labelled images.
        batch_size: Images per step.
        seeds: Number of held-out tenths, each with an order of its own, over which a layer's accuracy is averaged.
        seed: Of the first of them, and of the final training.
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
            check_choice("linear.taps", tap, TAP_NAMES)
        check_ranges(self, "linear", "lr lr_first lr_last weight_decay_first weight_decay_last", above=0)
        check_ranges(self, "linear", "weight_decay seed", least=0)
        check_ranges(self, "linear", "lrs weight_decays epochs batch_size seeds", least=1)

    @property
    def named_taps(self) -> tuple[str, ...]:
        """The requested taps, each once, in the order of TAP_NAMES; empty where the probe's own rule holds."""
        return tuple(tap for tap in TAP_NAMES if tap in self.taps) if set(self.taps) != {"cls"} else ()

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The learning rates to choose from, from first to last."""
        if self.lr is not None:
            return (self.lr,)
        return _interpolate_in_equal_ratios(self.lr_first, self.lr_last, self.lrs)

    @property
    def decays(self) -> tuple[float, ...]:
        """The weight decays to choose from, from first to last."""
        if self.lr is not None:
            return (self.weight_decay,)
        return _interpolate_in_equal_ratios(self.weight_decay_first, self.weight_decay_last, self.weight_decays)


def read_linear_recipe(settings: Params) -> LinearRecipe:
    """Return the recipe with the settings of a record."""
    given: dict[str, Any] = dict(settings)
    if "taps" in given:
        given["taps"] = given["taps"].split(",")
    return LinearRecipe(**given)


@dataclass(frozen=True, kw_only=True)
class AugmentedRecipe:
    """Training of linear layers on augmented images. Every field is part of the protocol; each learning rate is its own.

    Attributes:
        lr: Learning rates at the first step, falling to 0 along a cosine over all steps.
        weight_decay: On the layer's weights; not on biases and the norm.
        epochs: Passes over the labelled images.
        batch_size: Images per step over all ranks and accumulation steps; never more than there are. In each epoch, images after
            the last full batch are left out.
        crop_share: Smallest share of an image's area that a crop keeps.
        seed: Of the initial weights, the order of images, and every image's crops and flips.
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
        check_ranges(self, "linear_augmented", "lr", above=0)
        check_ranges(self, "linear_augmented", "weight_decay seed", least=0)
        check_ranges(self, "linear_augmented", "epochs batch_size", least=1)
        check_ranges(self, "linear_augmented", "crop_share", above=0, most=1)


def _interpolate_in_equal_ratios(first: float, last: float, count: int) -> tuple[float, ...]:
    """Return `count` numbers from `first` to `last`, both ends exact, rounded to six digits between them."""
    if count == 1:
        return (first,)
    steps = (first * (last / first) ** (index / (count - 1)) for index in range(1, count - 1))
    return (first, *(float(f"{step:.6g}") for step in steps), last)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """Training of encoder and head. Every field is part of the protocol, except those that are None.

    Attributes:
        epochs: Passes over the labelled images.
        batch: Images per step over all ranks and accumulation steps; never more than there are images.
        blocks: Number of last blocks to train, with the final norm and the head; 0 trains only these two, None everything.
        head_lambda: L2 penalty of the logistic regression that initialises the head; 0 initialises it with zeros.
        learning_rate: Of the head after the warm-up.
        smallest_rate: Learning rate at the end of the cosine.
        warmup_epochs: Epochs in which the learning rate rises from 0.
        layer_decay: Factor of the learning rate from each layer to the one below it; 1 for none.
        weight_decay: Of AdamW, on tensors that are not vectors; not on class token and positions.
        beta2: Of AdamW, whose beta1 is 0.9.
        clip: Largest norm of the gradient over all weights; 0 for no clipping.
        drop_path: Probability that a residual branch of the last block is dropped; linear in depth, 0 at the first.
        label_smoothing: Share of a label that is spread over all classes.
        mixup: Alpha of the Beta distribution of mixing shares; 0 for none. With `cutmix` too, each step draws one.
        cutmix: Alpha of the Beta distribution of pasted shares; 0 for none.
        crop_share: Smallest share of an image's area that a crop keeps; 1 for the evaluation's own transform, no crop.
        flip: Probability of a horizontal flip.
        randaugment_layers: Operations per image, each applied with probability 1/2.
        randaugment_magnitude: Of timm's RandAugment, on its scale of 0 to 10; 0 for none.
        randaugment_std: Standard deviation of the magnitude.
        erase: Probability that a rectangle of an image is replaced by noise.
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
        check_ranges(self, "finetune", "epochs batch randaugment_layers", least=1)
        check_ranges(self, "finetune", "learning_rate", above=0)
        check_ranges(self, "finetune", "warmup_epochs blocks head_lambda smallest_rate weight_decay clip", least=0)
        check_ranges(self, "finetune", "mixup cutmix randaugment_std", least=0)
        check_ranges(self, "finetune", "layer_decay crop_share", above=0, most=1)
        check_ranges(self, "finetune", "flip erase", least=0, most=1)
        check_ranges(self, "finetune", "beta2 drop_path label_smoothing", least=0, below=1)
        check_ranges(self, "finetune", "randaugment_magnitude", least=0, most=10)
        check_ranges(self, "finetune", "warmup_epochs", below=self.epochs)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def settings(self) -> dict[str, int | float]:
        """Every number by its name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def differing(self) -> dict[str, int | float]:
        """The numbers that differ from the defaults."""
        default = FinetuneRecipe()
        return {name: value for name, value in self.settings.items() if value != getattr(default, name)}


def read_finetune_recipe(settings: Params) -> FinetuneRecipe:
    """Return the recipe with the settings of a record, ignoring settings of other things."""
    known = FinetuneRecipe.__dataclass_fields__
    given: dict[str, Any] = {name: value for name, value in settings.items() if name in known}
    return FinetuneRecipe(
        **({"blocks": None} | given)
    )  # None is left out of the settings and may differ from the default
