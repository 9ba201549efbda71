"""Request: what the user asked for, checked before anything is read."""

import math
import re
from dataclasses import dataclass, field

from msn_eval.config.recipes import TAP_NAMES, AugmentedRecipe, FinetuneRecipe, LinearRecipe
from msn_eval.errors import UsageError, did_you_mean

SOLVER_NAMES = ("auto", "newton", "lbfgs", "cyanure", "sklearn")
PRECISIONS = ("fp32", "bf16", "fp16")
BAD_IMAGE_RULES = ("error", "skip")
DECODERS = ("pillow", "torchvision", "nvjpeg")
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The options of an evaluation. A field is called like its option, with `_` for `-` (and `lambda_` for lambda).

    None or an empty list means the protocol's or the device's own default.
    classes: that the data set must have; None for any number
    """

    checkpoint: list[str] = field(default_factory=list)
    arch: str | None = None
    checkpoint_key: str | None = None
    allow_missing: list[str] = field(default_factory=list)
    data: str | None = None
    allow_class_mismatch: bool = False
    classes: int | None = None
    subset: list[str] = field(default_factory=lambda: ["low-shot"])
    probe: list[str] = field(default_factory=lambda: ["logistic"])
    tap: str | None = None
    lambda_: list[str] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    linear: LinearRecipe = field(default_factory=LinearRecipe)
    linear_augmented: AugmentedRecipe = field(default_factory=AugmentedRecipe)
    solver: str = "auto"
    device: str = "auto"
    precision: str | None = None
    batch_size: str = "auto"
    workers: str = "auto"
    compile: bool = False
    decoder: str = "pillow"
    image_pixels: int | None = None
    patch_drop: float | None = None
    limit: int | None = None
    seed: int = 0
    on_bad_image: str = "error"
    canary: bool = False
    out: str = "runs"
    cache: str | None = None
    no_cache: bool = False
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    save: str | None = None

    def __post_init__(self) -> None:
        if self.tap is not None:
            _one_of("tap", self.tap, TAP_NAMES)
            if "linear" in self.probe and self.linear.named_taps:
                raise UsageError(
                    f"--tap {self.tap}: linear.taps names {', '.join(self.linear.named_taps)}",
                    hint="Leave out one of them.",
                )
        _one_of("solver", self.solver, SOLVER_NAMES)
        _one_of("decoder", self.decoder, DECODERS)
        _one_of("on-bad-image", self.on_bad_image, BAD_IMAGE_RULES)
        if self.precision is not None:
            _one_of("precision", self.precision, PRECISIONS)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"--device {self.device}: not a device", hint="Use auto, cpu, cuda or cuda:N.")
        if "finetune" in self.probe and self.precision == "fp16":
            raise UsageError("--precision fp16: gradients underflow in it", hint="Fine-tune in bf16 or fp32.")
        if "finetune" in self.probe and self.patch_drop:
            raise UsageError("--patch-drop: fine-tuning sees whole images", hint="Ask for it with other probes alone.")
        if "finetune" in self.probe and self.compile:
            raise UsageError(
                "--compile: fine-tuning trains the network as it is", hint="Ask for it with other probes alone."
            )
        if self.save is not None and "finetune" not in self.probe:
            raise UsageError("--save: no network is trained", hint="It goes with --probe finetune.")
        if self.save is not None and self.canary:
            raise UsageError("--save: with --canary nothing is written", hint="Leave out one of them.")
        for name in ("subset", "probe"):
            if not getattr(self, name):
                raise UsageError(f"--{name}: nothing given", hint=f"Name at least one {name}.")
        for text in self.lambda_:
            if text != AUTO:
                _positive("lambda", _number("lambda", text))
        for temperature in self.temperature:
            _positive("temperature", temperature)
        for k in self.k:
            _at_least("k", k, 1)
        _at_least("seed", self.seed, 0)
        if self.limit is not None:
            _at_least("limit", self.limit, 1)
        if self.image_pixels is not None:
            _at_least("image-pixels", self.image_pixels, 1)
        if self.patch_drop is not None and not 0 <= self.patch_drop < 1:
            raise UsageError(f"--patch-drop {self.patch_drop}: out of range", hint="Give a share from 0 up to 1.")
        if self.patch_drop is not None and "linear-augmented" in self.probe:
            raise UsageError(
                "--patch-drop: linear-augmented encodes whole crops", hint="Leave it out, or ask for another probe."
            )
        _count_or_auto("batch-size", self.batch_size, least=1)
        _count_or_auto("workers", self.workers, least=0)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Give the lambdas that are numbers, each once."""
        return tuple(dict.fromkeys(float(text) for text in self.lambda_ if text != AUTO))

    @property
    def chooses_strength(self) -> bool:
        """Tell whether the labelled images are to choose a lambda."""
        return AUTO in self.lambda_

    @property
    def batch_images(self) -> int | None:
        return None if self.batch_size == "auto" else int(self.batch_size)

    @property
    def worker_count(self) -> int | None:
        return None if self.workers == "auto" else int(self.workers)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(
            f"--{option} {value}: there is no such {option}.{did_you_mean(value, known)}",
            hint=f"Known: {', '.join(known)}.",
        )


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--{option} {text}: not a number", hint=f"Give a finite number above 0, or {AUTO}.") from None


def _positive(option: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"--{option} {value}: out of range", hint="Give a finite number above 0.")


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"--{option} {value}: out of range", hint=f"Give a whole number of at least {least}.")


def _count_or_auto(option: str, value: str, *, least: int) -> None:
    if value != "auto" and not (value.isdecimal() and int(value) >= least):
        raise UsageError(
            f"--{option} {value}: out of range", hint=f"Give `auto` or a whole number of at least {least}."
        )
