"""Run: a recipe at work in its folder: what it trains on and with, and what it goes on from."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msn_eval.checkpoints.checkpoint import weights_sha256
from msn_eval.checkpoints.run_folder import CHECKPOINTS, CONFIG, newest_snapshot, read_manifest
from msn_eval.config.request import EvaluationConfig
from msn_eval.data import list_datasets, read_split
from msn_eval.data.images import ImageSet
from msn_eval.errors import DistributedError, UsageError
from msn_eval.evaluation.plan import cache_folder
from msn_eval.files.atomic import prepare_folder, write_atomically
from msn_eval.version import __version__
from msn_pretrain.config.load import read_recipe, recipe_as_yaml
from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe, architecture_of
from msn_pretrain.data.views import ViewKind
from msn_pretrain.distributed.process_group import Ranks, first_decides
from msn_pretrain.methods.msn import build_msn
from msn_pretrain.methods.simsiam import build_simsiam
from msn_pretrain.training import snapshot as snapshots
from msn_pretrain.training.gradients import Model
from msn_pretrain.training.optimizer import build_optimizer
from msn_pretrain.training.snapshot import EvaluatedEncoder, Snapshot, read_snapshot

_log = logging.getLogger(__name__)
Recipe = MSNRecipe | SimSiamRecipe
# What no number that is learnt depends on.
_FREE = frozenset(
    (
        *("run.dir", "run.device", "run.log_every", "run.snapshot_minutes", "run.keep_every", "run.compare_every"),
        *("data.workers", "data.pin_memory"),
        *("watch.probe_every", "watch.probe_data", "watch.probes", "watch.subset", "watch.on_alarm"),
    )
)
DATA = "data"  # what --allow-config-change calls the images themselves


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What is trained, on its device."""

    model: Model
    optimizer: torch.optim.Optimizer

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Give the state of model and optimiser."""
        return self.model.state_dict(), self.optimizer.state_dict()

    def restore(self, snapshot: Snapshot) -> None:
        """Take over the state of a snapshot."""
        self.model.load_state_dict(snapshot.model)
        self.optimizer.load_state_dict(dict(snapshot.optimizer))


def build_learner(recipe: Recipe, device: torch.device) -> Learner:
    """Build model and optimiser of a recipe on a device, in training mode."""
    model: Model = build_msn(recipe) if isinstance(recipe, MSNRecipe) else build_simsiam(recipe)
    model.to(device)
    attention = recipe.run.attention
    if attention == "explicit" or (
        attention == "auto" and precision_of(recipe, device) == "bf16" and device.type == "cpu"
    ):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]
    if recipe.run.compile:
        for network in _encoders(model):
            network.compile()
    return Learner(model=model, optimizer=build_optimizer(model, recipe))


def _encoders(model: Model) -> list[nn.Module]:
    from msn_pretrain.methods.msn import MSN

    return [model.anchor.trunk, model.target.trunk] if isinstance(model, MSN) else [model.network]


def evaluated_encoder(learner: Learner, recipe: Recipe) -> EvaluatedEncoder:
    """Give the network of a learner that is evaluated."""
    return EvaluatedEncoder(
        weights=learner.model.exported().state_dict(),
        architecture=architecture_of(recipe.encoder),
        image_pixels=recipe.views.image_pixels,
    )


def precision_of(recipe: Recipe, device: torch.device) -> str:
    """Give bf16 or fp32."""
    if recipe.run.precision != "auto":
        return recipe.run.precision
    return "bf16" if device.type == "cuda" else "fp32"


def autocast_of(recipe: Recipe, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Give the context in which forward passes are computed; it can be entered again and again."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of(recipe, device) == "bf16")


def view_kinds(recipe: Recipe) -> tuple[ViewKind, ...]:
    """Give the kinds of views a recipe wants: those of the whole size, MSN's target first, then the focal ones."""
    views = recipe.views
    amounts = (views.brightness, views.contrast, views.saturation, views.hue)
    alike: dict[str, Any] = {
        "flip": views.flip,
        "jitter": views.jitter,
        "amounts": amounts,
        "grey": views.grey,
        "blur": views.blur,
        "sigma": views.blur_sigma,
        "interpolation": views.interpolation,
    }
    targets = 1 if isinstance(recipe, MSNRecipe) else 0
    kinds = [
        ViewKind(pixels=views.image_pixels, count=targets + views.random_views, scale=views.crop_scale, **alike),
        ViewKind(pixels=views.focal_pixels, count=views.focal_views, scale=views.focal_crop_scale, **alike),
    ]
    return tuple(kind for kind in kinds if kind.count)


def makes_views_on_device(recipe: Recipe, device: torch.device) -> bool:
    """Tell whether views are made by batched operations on the training device, not one by one in the loader."""
    made = recipe.views.made
    return made == "device" or (made == "auto" and device.type == "cuda")


def training_images(recipe: Recipe) -> ImageSet:
    """Read the training images of a recipe. Raises UsageError where it names none, DataError where they cannot be read."""
    if not recipe.data.root:
        choices = "; ".join(f"{name}: {what}" for name, what in list_datasets().items())
        raise UsageError("data.root is not given", hint=f"Add data.root=X, X being one of\n{choices}")
    cache_dir = cache_folder(EvaluationConfig())
    prepare_folder(cache_dir, option="cache")
    images = read_split(recipe.data.root, "train", cache_dir=cache_dir)
    return images.first_of_each_class(recipe.data.limit) if recipe.data.limit else images


def data_sha256(images: ImageSet) -> str:
    """Give the SHA-256 of the images' ids, a line each: what is told apart is another list of files."""
    return hashlib.sha256("".join(f"{one}\n" for one in images.ids).encode("utf-8", "surrogateescape")).hexdigest()


def config_sha256(recipe: Recipe) -> str:
    """Give the SHA-256 of what of a recipe shapes its numbers."""
    values = {key: value for key, value in flat(asdict(recipe)).items() if key not in _FREE}
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()


def shared_facts(recipe: Recipe, images: ImageSet, learner: Learner) -> dict[str, str]:
    """Give what all ranks must have in common."""
    return {
        "recipe": config_sha256(recipe),
        "images": data_sha256(images),
        "weights": weights_sha256(learner.model.state_dict()),
        "torch": torch.__version__,
        "package": __version__,
    }


def open_run(recipe: Recipe, images: ImageSet, *, allowed: Sequence[str] = ()) -> Path | None:
    """Make or open the folder of a run, and give the snapshot that it goes on from, None for a new one.

    allowed: keys of the recipe that may differ from what the folder was trained with so far; `data` for the images
    Raises UsageError with the differences where others do.
    """
    run = Path(recipe.run.dir)
    prepare_folder(run, option="run.dir")
    for name in (CHECKPOINTS, "eval"):
        (run / name).mkdir(exist_ok=True)
    known = run / CONFIG
    if known.exists():
        _check_unchanged(read_recipe(known), recipe, allowed, where=str(known))
    found, skipped = newest_snapshot(run)
    for reason in skipped:
        _log.warning("passed over a snapshot that is not whole: %s", reason)
    if found is not None and found.facts.get("data_sha256") != data_sha256(images) and DATA not in allowed:
        raise UsageError(
            "data: the training images are others than those that this run began with",
            where=str(run),
            hint=f"Restore them, or go on with --allow-config-change {DATA}.",
        )
    write_atomically(known, recipe_as_yaml(recipe).encode())
    return None if found is None else found.folder


def _check_unchanged(before: Recipe, now: Recipe, allowed: Sequence[str], *, where: str) -> None:
    old, new = flat(asdict(before)), flat(asdict(now))
    unknown = [key for key in allowed if key not in old.keys() | new.keys() | {DATA}]
    if unknown:
        raise UsageError(f"--allow-config-change {unknown[0]}: no such key", hint="Name it as section.key.")
    changed = [
        key
        for key in dict.fromkeys([*old, *new])
        if key not in _FREE and key not in allowed and old.get(key) != new.get(key)
    ]
    if changed:
        lines = "".join(f"\n  {key}: {old.get(key)} there, {new.get(key)} now" for key in changed)
        raise UsageError(
            f"the recipe differs from the one that this folder was trained with:{lines}",
            where=where,
            hint="Give another run.dir; or go on regardless with "
            + " ".join(f"--allow-config-change {key}" for key in changed),
        )


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested mappings as one, its keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def resume(learner: Learner, folder: Path | None, ranks: Ranks) -> Snapshot | None:
    """Put a learner and this rank's generators where a snapshot left them."""
    if folder is None:
        return None
    snapshot = read_snapshot(read_manifest(folder))
    learner.restore(snapshot)
    if len(snapshot.rng) != ranks.world and ranks.first:
        _log.warning(
            "this run had %d ranks and goes on with %d: it is not what it would have become, bit by bit",
            len(snapshot.rng), ranks.world,
        )  # fmt: skip
    if ranks.rank < len(snapshot.rng):
        snapshots.set_generators(snapshot.rng[ranks.rank], ranks.device)
    return snapshot


def roll_back(learner: Learner, run: Path, ranks: Ranks) -> int | None:
    """Give a learner the weights and the optimiser of a run's newest snapshot again; give its step, None where there is none."""
    found = first_decides(ranks, lambda: newest_snapshot(run)[0])
    if found is None:
        return None
    learner.restore(read_snapshot(found))
    return found.step


_NAME = "run.lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which the system takes back when this process ends, however it ends.

    A lock by fcntl is this process's alone: a loader's worker that outlives it holds nothing.
    Raises DistributedError naming host and process that hold it. On disks without locks it warns and goes on: no file
    of a run depends on it.
    """
    with (run / _NAME).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise DistributedError(
                    f"is being trained in by {_holder(run / _NAME)}",
                    where=str(run),
                    hint="Wait for it or end it, or give another run.dir.",
                ) from error
            _log.warning("%s: this disk has no locks (%s); start no second job there", run, error.strerror)
        file.seek(0)
        file.truncate()
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        file.write(json.dumps(facts))
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        job = f" (job {facts['job']})" if facts["job"] else ""
        return f"process {facts['pid']} on {facts['host']}{job}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
