"""Request: what the user asked for, checked before anything is read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from msn_eval.config.recipes import TAP_NAMES, AugmentedRecipe, FinetuneRecipe, LinearRecipe
from msn_eval.config.yaml_config import check_choice, check_range, check_ranges
from msn_eval.errors import UsageError, did_you_mean

SOLVER_NAMES = ("auto", "newton", "lbfgs", "cyanure", "sklearn")
PRECISIONS = ("fp32", "bf16", "fp16")
BAD_IMAGE_RULES = ("error", "skip")
DECODERS = ("pillow", "torchvision", "nvjpeg")
SEARCHES = ("auto", "torch", "faiss")
AUTO = "auto"
_LABEL = re.compile(r"([^=:/\\?]+)=")  # of a checkpoint that is written LABEL=X
REAL_PREFIX = "real:"  # of a --test that is the validation images with the labels of ImageNet ReaL


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The options of an evaluation. A field has the name of its option, with `_` for `-` (and `lambda_` for lambda).

    None or an empty list means the protocol's or the device's own default.

    Attributes:
        checkpoint: Checkpoints to measure, `X` or `NAME=X`.
        arch: timm architectures where files leave them open, `NAME` for all checkpoints or `CHECKPOINT=NAME` for one, which
            is written as in `checkpoint` or by its NAME there.
        mean: A value per channel that replaces the checkpoints' own, on the [0, 1] scale.
        std: The same.
        checkpoint_key: Which of several networks of a file.
        allow_missing: Patterns of weights that may be absent.
        data: Name of the data set.
        test: Further data sets whose val the same fits are scored on; `real:FILE` for the labels of ImageNet ReaL.
        class_map: File with the trained class of each class of the test sets, where their names differ.
        allow_class_mismatch: Number the union of the classes where train and val differ in them.
        classes: Number of classes that the data set must have; None for any.
        subset: Names of labelled subsets.
        probe: Names of probes.
        tap: Which vector of the encoder is the feature.
        lambda_: L2 penalties of the logistic probe, or `auto`.
        k: Numbers of neighbours.
        temperature: Temperatures of the neighbours' vote.
        search: Who proposes the candidates of the neighbours, one of `SEARCHES`; it changes no result.
        linear: Settings of the probe `linear`.
        linear_augmented: Settings of the probe `linear-augmented`.
        solver: Solver of the logistic probe.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `fp32`, `bf16` or `fp16`.
        batch_size: Images per forward pass, or `auto`.
        workers: Decoding processes, or `auto`.
        compile: Compile the network.
        decoder: Decoder of image files.
        image_pixels: Image size that replaces the checkpoint's native one.
        patch_drop: Share of the patches to drop, in [0, 1).
        limit: Most validation images per class.
        seed: Seed of everything random.
        on_bad_image: `error`, or `skip` to evaluate without unreadable images.
        canary: Also evaluate with shuffled labels.
        out: Folder of results.
        cache: Folder of cached features.
        no_cache: Neither read nor write cached features.
        finetune: Settings of the probe `finetune`.
        save: Folder for fine-tuned networks.
    """

    checkpoint: list[str] = field(default_factory=list)
    arch: list[str] | None = None
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    checkpoint_key: str | None = None
    allow_missing: list[str] = field(default_factory=list)
    data: str | None = None
    test: list[str] = field(default_factory=list)
    class_map: str | None = None
    allow_class_mismatch: bool = False
    classes: int | None = None
    subset: list[str] = field(default_factory=lambda: ["low-shot"])
    probe: list[str] = field(default_factory=lambda: ["logistic"])
    tap: str | None = None
    lambda_: list[str] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    search: str = "auto"
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
        for option, value, known in (
            ("--tap", self.tap, TAP_NAMES),
            ("--solver", self.solver, SOLVER_NAMES),
            ("--decoder", self.decoder, DECODERS),
            ("--search", self.search, SEARCHES),
            ("--on-bad-image", self.on_bad_image, BAD_IMAGE_RULES),
            ("--precision", self.precision, PRECISIONS),
        ):
            if value is not None:
                check_choice(option, value, known)
        if self.tap and "linear" in self.probe and self.linear.named_taps:
            names = ", ".join(self.linear.named_taps)
            raise UsageError(f"--tap {self.tap}: linear.taps names {names}", hint="Leave out one of them.")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"--device {self.device}: not a device", hint="Use auto, cpu, cuda or cuda:N.")
        finetunes, augments = "finetune" in self.probe, "linear-augmented" in self.probe
        others = "Use it with other probes only."
        for is_wrong, what, hint in (
            (finetunes and self.precision == "fp16", "--precision fp16: gradients underflow", "Use bf16 or fp32."),
            (finetunes and self.patch_drop, "--patch-drop: fine-tuning uses all patches", others),
            (finetunes and self.compile, "--compile: fine-tuning trains the uncompiled network", others),
            (augments and self.patch_drop is not None, "--patch-drop: linear-augmented encodes whole crops", others),
            (self.save and not finetunes, "--save: no network is trained", "Use it with --probe finetune."),
            (self.test and finetunes, "--test: fine-tuned networks are scored on the validation images only", others),
            (
                self.test and self.canary,
                "--test: --canary looks for leaks into the validation images",
                "Leave out one of them.",
            ),
            (self.class_map and not self.test, "--class-map: there is no test set", "Use it with --test X."),
            (len(set(self.test)) < len(self.test), "--test: a test set is given twice", "Give each of them once."),
            (self.save and self.canary, "--save: with --canary nothing is written", "Leave out one of them."),
        ):
            if is_wrong:
                raise UsageError(what, hint=hint)
        for name in ("subset", "probe"):
            if not getattr(self, name):
                raise UsageError(f"--{name}: nothing given", hint=f"Name at least one {name}.")
        for name in ("mean", "std"):
            read_channels(f"--{name}", getattr(self, name))
        if self.checkpoint:
            self._check_archs()
        for text in self.lambda_:
            if text != AUTO:
                check_range("--lambda", _parse_lambda(text), above=0)
        check_ranges(self, "--", "temperature", above=0)
        check_ranges(self, "--", "k limit image_pixels", least=1)
        check_ranges(self, "--", "seed", least=0, below=2**64)
        check_ranges(self, "--", "patch_drop", least=0, below=1)
        _check_count_or_auto("batch-size", self.batch_size, least=1)
        _check_count_or_auto("workers", self.workers, least=0)

    def arch_of(self, checkpoint: str) -> str | None:
        """Return the architecture that --arch gives a checkpoint, None where it gives none."""
        archs = dict(map(self._split_arch, self.arch or ()))
        return archs.get(checkpoint, archs.get(None))

    def _split_arch(self, text: str) -> tuple[str | None, str]:
        """Split `CHECKPOINT=NAME`. The checkpoint is None where the text is a NAME, whose keywords have `=` too.

        The checkpoint is written as in --checkpoint, or by the label alone that it has there.
        """
        for name in self.checkpoint:
            label = _LABEL.match(name)
            for spelling in (name, label[1]) if label else (name,):
                if text.startswith(f"{spelling}="):
                    return name, text[len(spelling) + 1 :]
        return None, text

    def _check_archs(self) -> None:
        names = [name for name, _ in map(self._split_arch, self.arch or ())]
        for name, text in zip(names, self.arch or (), strict=True):
            other, equals, _ = text.partition("?")[0].partition("=")
            if name is None and equals:
                what = f"--arch {text}: {other!r} is not one of the checkpoints.{did_you_mean(other, self.checkpoint)}"
                raise UsageError(what, hint=f"Write it as --checkpoint does: {', '.join(self.checkpoint)}.")
            if names.count(name) > 1:
                what = f"--arch: several architectures for {name or 'all checkpoints'}"
                raise UsageError(what, hint="Give one, or write CHECKPOINT=NAME.")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The lambdas that are numbers, each once."""
        return tuple(dict.fromkeys(float(text) for text in self.lambda_ if text != AUTO))

    @property
    def chooses_strength(self) -> bool:
        """Whether the labelled images choose a lambda."""
        return AUTO in self.lambda_

    @property
    def batch_images(self) -> int | None:
        return None if self.batch_size == "auto" else int(self.batch_size)

    @property
    def worker_count(self) -> int | None:
        return None if self.workers == "auto" else int(self.workers)


def read_channels(option: str, values: Sequence[float] | None) -> tuple[float, float, float] | None:
    """Return the mean or std that an option gives, a value per channel on the [0, 1] scale; None for none.

    Raises:
        UsageError: They are not three numbers in [0, 1], or a std is 0.
    """
    if not values:
        return None
    texts = ",".join(f"{value:g}" for value in values)
    if len(values) != 3:
        raise UsageError(f"{option} {texts}: not three numbers", hint="Give one per channel: R,G,B.")
    if not all(0 <= value <= 1 for value in values):
        hint = "Give values on the [0, 1] scale: divide those for pixels from 0 to 255 by 255."
        raise UsageError(f"{option} {texts}: out of range", hint=hint)
    if option == "--std" and 0 in values:
        raise UsageError(f"{option} {texts}: not above 0", hint="Give 1,1,1 for no division.")
    red, green, blue = map(float, values)
    return red, green, blue


def parse_channels(option: str, text: str | None) -> tuple[float, float, float] | None:
    """Return the mean or std that an option gives as `R,G,B`, None for none. Raises UsageError as `read_channels` does."""
    try:
        values = [float(value) for value in (text or "").split(",")] if text is not None else None
    except ValueError:
        raise UsageError(f"{option} {text}: not three numbers", hint="Give one per channel: R,G,B.") from None
    return read_channels(option, values)


def _parse_lambda(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--lambda {text}: not a number", hint=f"Give a finite number above 0, or {AUTO}.") from None


def _check_count_or_auto(option: str, value: str, *, least: int) -> None:
    if value != "auto" and not (value.isdecimal() and int(value) >= least):
        hint = f"Give `auto` or a whole number of at least {least}."
        raise UsageError(f"--{option} {value}: out of range", hint=hint)
