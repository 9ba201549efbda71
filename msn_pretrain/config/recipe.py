"""Recipes: everything that defines a pre-training run. `load.read_recipe` reads them.

    MSNRecipe      run, data, views, encoder, head, masking, criterion, optimization, ema, watch
    SimSiamRecipe  run, data, views, encoder, projector, optimization, watch

Defaults are the published values: those of the released ViT-S/16 for MSN, of ResNet-50 for SimSiam.
"""

from dataclasses import dataclass, field

from msn_eval.config.yaml_config import check_choice, check_range, check_ranges
from msn_eval.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how a run computes. Only `seed`, and by rounding `precision`, change what is learnt.

    Attributes:
        dir: Folder of the run.
        seed: Seed of everything that is drawn.
        device: auto, cpu, cuda, cuda:N, or several such as cuda:0,cuda:1.
        precision: auto (bf16 on CUDA, fp32 on CPU), fp32 or bf16.
        attention: auto, fused (SDPA) or explicit, which is faster in bf16 on CPUs.
        compile: Whether encoders run through torch.compile, once per size of views.
        activation_checkpointing: Whether blocks of Transformers are computed again in backward instead of kept in memory.
        shard: Whether the encoders' weights, gradients and moments are divided among the ranks (FSDP).
        micro_batch: Images per forward pass of a rank, 0 for its complete share of the batch.
        log_every: Steps between two lines of metrics.jsonl.
        snapshot_minutes: Minutes between two snapshots. There is also one at the end of each epoch.
        keep_every: Epochs between two snapshots that are never removed, 0 for none.
        compare_every: Steps between two comparisons of the ranks' weights, 0 for only those before snapshots.
    """

    dir: str = "runs/pretrain"
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    attention: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    shard: bool = False
    micro_batch: int = 0
    log_every: int = 10
    snapshot_minutes: float = 10.0
    keep_every: int = 25
    compare_every: int = 100

    def __post_init__(self) -> None:
        check_choice("run.precision", self.precision, ("auto", "fp32", "bf16"))
        check_choice("run.attention", self.attention, ("auto", "fused", "explicit"))
        check_ranges(self, "run", "micro_batch keep_every compare_every", least=0)
        check_ranges(self, "run", "seed", least=0, below=2**64)
        check_ranges(self, "run", "log_every", least=1)
        check_ranges(self, "run", "snapshot_minutes", above=0)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images: a folder with `train/<class>/*`, or another data set that `msn-eval --data` accepts.

    Attributes:
        root: Path or name of the data set; required.
        workers: Decoding processes, 0 for none.
        limit: Maximum images per class, 0 for all.
        pin_memory: Whether batches go to a GPU through page-locked memory.
    """

    root: str = ""
    workers: int = 4
    limit: int = 0
    pin_memory: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "data", "workers limit", least=0)


@dataclass(frozen=True, kw_only=True)
class Views:
    """How an image becomes views.

    Attributes:
        image_pixels: Side of the target view and the random anchor views.
        focal_pixels: Side of the focal anchor views.
        random_views: Random anchor views, apart from MSN's target view. SimSiam has two views and no others.
        focal_views: Focal anchor views, unmasked.
        crop_scale: Range of the crop's share of the image's area.
        focal_crop_scale: The same for focal views.
        interpolation: bilinear or bicubic.
        flip: Probability of a horizontal flip.
        jitter: Probability of the colour jitter.
        brightness: Strength of the jitter, as for torchvision's ColorJitter.
        contrast: Likewise.
        saturation: Likewise.
        hue: Likewise.
        grey: Probability of greyscale.
        blur: Probability of a Gaussian blur.
        blur_sigma: Range of its standard deviation in pixels.
        made: loader (where images are decoded), device (on the training device, in batches on a GPU), or auto: device on CUDA.
            The two differ by rounding.
    """

    image_pixels: int = 224
    focal_pixels: int = 96
    random_views: int = 1
    focal_views: int = 10
    crop_scale: tuple[float, float] = (0.3, 1.0)
    focal_crop_scale: tuple[float, float] = (0.05, 0.3)
    interpolation: str = "bilinear"
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    made: str = "auto"

    def __post_init__(self) -> None:
        check_choice("views.made", self.made, ("auto", "loader", "device"))
        check_choice("views.interpolation", self.interpolation, ("bilinear", "bicubic"))
        check_ranges(self, "views", "image_pixels focal_pixels random_views", least=1)
        check_ranges(self, "views", "focal_views brightness contrast saturation", least=0)
        check_ranges(self, "views", "flip jitter grey blur", least=0, most=1)
        check_ranges(self, "views", "hue", least=0, most=0.5)
        check_ranges(self, "views", "crop_scale focal_crop_scale", above=0, most=1)
        check_ranges(self, "views", "blur_sigma", above=0)
        for name in ("crop_scale", "focal_crop_scale", "blur_sigma"):
            ends = tuple(getattr(self, name))
            if len(ends) != 2:
                hint = "Use a lower and an upper value: [0.3, 1.0]."
                raise UsageError(f"views.{name}: {list(ends)} are not two numbers", hint=hint)
            check_range(f"views.{name}", ends[1], least=ends[0])
            object.__setattr__(self, name, ends)  # a YAML file gives a list


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The network that is trained.

    Attributes:
        name: timm's name with keywords, such as vit_tiny_patch16_224?img_size=32&patch_size=4.
        drop_path: Probability that the last block is skipped; it rises linearly from the first block.
        first_weights: Initial weights of a Transformer: `release` as in the MSN release, or `timm`.
        position_scale: Factor for the initial position embeddings, whose standard deviation is 0.02. Embeddings of patches of few
            pixels are larger, so that a small network may ignore positions for a long time.
        stem: `cifar` for a residual network's 3 x 3 stem without max-pool, else `imagenet`.
    """

    name: str = "vit_small_patch16_224"
    drop_path: float = 0.0
    first_weights: str = "release"
    position_scale: float = 1.0
    stem: str = "imagenet"

    def __post_init__(self) -> None:
        check_range("encoder.drop_path", self.drop_path, least=0, most=0.999)
        check_choice("encoder.first_weights", self.first_weights, ("release", "timm"))
        check_range("encoder.position_scale", self.position_scale, above=0)
        check_choice("encoder.stem", self.stem, ("imagenet", "cifar"))


def architecture_of(encoder: Encoder, *, drop_path: float = 0.0) -> str:
    """Return an encoder's architecture as for `msn-eval --arch`; for training with its rate of stochastic depth."""
    name, _, keywords = encoder.name.partition("?")
    stem = "" if encoder.stem == "imagenet" else f"stem={encoder.stem}"
    rate = f"drop_path_rate={drop_path}" if drop_path else ""
    joined = "&".join(text for text in (keywords, stem, rate) if text)
    return f"{name}?{joined}" if joined else name


@dataclass(frozen=True, kw_only=True)
class Head:
    """MSN's projection head: three linear layers, the first two followed by BatchNorm and GELU."""

    hidden: int = 2048
    output: int = 256
    batch_norm: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "head", "hidden output", least=1)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Share of patches to drop from random anchor views: one draw per step, as in the release, or per image."""

    ratio: float = 0.15
    per_image: bool = False

    def __post_init__(self) -> None:
        check_range("masking.ratio", self.ratio, least=0, most=0.999)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """MSN's loss.

    Attributes:
        prototypes: Number of prototypes.
        temperature: Of the softmax of anchors and targets.
        sharpening: T of the power 1 / T of targets, at the first step.
        final_sharpening: The same at the end of the stretched schedule.
        sinkhorn_iterations: 0 for no Sinkhorn balancing.
        me_max_weight: Weight of the mean-entropy term.
        entropy_weight: Weight of the entropy of the predictions.
        prior: uniform, or power_law with `prior_exponent` (arXiv:2210.07277).
        prior_exponent: Exponent of the power law.
    """

    prototypes: int = 1024
    temperature: float = 0.1
    sharpening: float = 0.25
    final_sharpening: float = 0.25
    sinkhorn_iterations: int = 3
    me_max_weight: float = 1.0
    entropy_weight: float = 0.0
    prior: str = "uniform"
    prior_exponent: float = 0.25

    def __post_init__(self) -> None:
        check_range("criterion.prototypes", self.prototypes, least=2)
        check_ranges(self, "criterion", "temperature sharpening final_sharpening", above=0)
        check_ranges(self, "criterion", "sinkhorn_iterations me_max_weight entropy_weight prior_exponent", least=0)
        check_choice("criterion.prior", self.prior, ("uniform", "power_law"))


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """MSN's optimiser, AdamW, and its schedules.

    Attributes:
        epochs: Epochs of training.
        batch_size: Images of one step, over all ranks.
        start_learning_rate: At the first step.
        learning_rate: After the warm-up.
        final_learning_rate: At the end of the stretched schedule.
        warmup: Epochs from `start_learning_rate` to `learning_rate`.
        stretch: Length of the schedules in multiples of the epochs. Above 1 their ends are never reached.
        weight_decay: At the first step.
        final_weight_decay: At the end of the stretched schedule.
        clip: Maximum gradient norm of encoder and head, 0 for no limit. Prototypes are not clipped.
    """

    epochs: int = 800
    batch_size: int = 1024
    start_learning_rate: float = 2e-4
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6
    warmup: float = 15.0
    stretch: float = 1.25
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    clip: float = 3.0

    def __post_init__(self) -> None:
        check_ranges(self, "optimization", "epochs stretch", least=1)
        check_ranges(self, "optimization", "batch_size", least=2)
        check_ranges(self, "optimization", "learning_rate", above=0)
        check_ranges(self, "optimization", "start_learning_rate final_learning_rate warmup clip", least=0)
        check_ranges(self, "optimization", "weight_decay final_weight_decay", least=0)


@dataclass(frozen=True, kw_only=True)
class EMA:
    """Decay of the target encoder's moving average; it changes linearly over the stretched schedule."""

    start: float = 0.996
    final: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self, "ema", "start final", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Evaluation and alarms during training.

    Attributes:
        probe_every: Epochs between two evaluations with msn_eval, 0 for none.
        probe_data: Their data set; empty means that of the run.
        probes: Names of probes.
        subset: Labelled images of the probes.
        on_alarm: stop or warn when losses are not finite or the representation collapses. rollback restores the last snapshot's
            weights when losses are not finite, skips the images in between, and stops on collapse.
    """

    probe_every: int = 0
    probe_data: str = ""
    probes: list[str] = field(default_factory=lambda: ["knn"])
    subset: str = "5imgs"
    on_alarm: str = "stop"

    def __post_init__(self) -> None:
        check_range("watch.probe_every", self.probe_every, least=0)
        check_choice("watch.on_alarm", self.on_alarm, ("stop", "warn", "rollback"))


@dataclass(frozen=True, kw_only=True)
class MSNRecipe:
    """Masked Siamese Networks. Source: arXiv:2204.07141; github.com/facebookresearch/msn, configs/pretrain/msn_vits16.yaml."""

    method: str = "msn"
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=Views)
    encoder: Encoder = field(default_factory=Encoder)
    head: Head = field(default_factory=Head)
    masking: Masking = field(default_factory=Masking)
    criterion: Criterion = field(default_factory=Criterion)
    optimization: Optimization = field(default_factory=Optimization)
    ema: EMA = field(default_factory=EMA)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        check_choice("encoder.stem", self.encoder.stem, ("imagenet",))


@dataclass(frozen=True, kw_only=True)
class Projector:
    """SimSiam's projector, with BatchNorm after each layer, and predictor.

    Attributes:
        layers: Layers of the projector: 3 on ImageNet, 2 on CIFAR-10.
        output: Width of the projection and of the projector's hidden layers.
        predictor: Width of the predictor's hidden layer.
    """

    layers: int = 3
    output: int = 2048
    predictor: int = 512

    def __post_init__(self) -> None:
        check_ranges(self, "projector", "layers output predictor", least=1)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """SimSiam's optimiser: SGD, or AdamW for Transformers.

    Attributes:
        optimizer: sgd or adamw.
        epochs: Epochs of training.
        batch_size: Images of one step, over all ranks.
        learning_rate: For 256 images; multiplied by batch_size / 256, with a cosine decay over epochs.
        momentum: Of SGD.
        weight_decay: For `sgd` of all parameters, biases and norms included; for `adamw` of matrices only.
        warmup: Epochs of linear warm-up.
        clip: Maximum gradient norm, 0 for no limit.
        fixed_predictor_rate: Whether the predictor's learning rate stays constant.
    """

    optimizer: str = "sgd"
    epochs: int = 100
    batch_size: int = 512
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.0
    clip: float = 0.0
    fixed_predictor_rate: bool = True

    def __post_init__(self) -> None:
        check_choice("optimization.optimizer", self.optimizer, ("sgd", "adamw"))
        check_range("optimization.epochs", self.epochs, least=1)
        check_range("optimization.batch_size", self.batch_size, least=2)
        check_range("optimization.learning_rate", self.learning_rate, above=0)
        check_ranges(self, "optimization", "weight_decay warmup clip", least=0)
        check_range("optimization.momentum", self.momentum, least=0, most=0.9999)


@dataclass(frozen=True, kw_only=True)
class SimSiamRecipe:
    """Simple Siamese networks. Source: arXiv:2011.10566; github.com/facebookresearch/simsiam."""

    method: str = "simsiam"
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    views: Views = field(default_factory=lambda: Views(random_views=2, focal_views=0, crop_scale=(0.2, 1.0)))
    encoder: Encoder = field(default_factory=lambda: Encoder(name="resnet50"))
    projector: Projector = field(default_factory=Projector)
    optimization: SGD = field(default_factory=SGD)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        if self.views.random_views != 2 or self.views.focal_views:
            hint = "Set views.random_views=2 and views.focal_views=0."
            raise UsageError("views: SimSiam compares two views", hint=hint)
