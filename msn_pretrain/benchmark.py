"""Training speed of a recipe on this machine, and the estimate of `--dry-run`."""

import copy
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from msn_eval.distributed.group import ALONE
from msn_eval.errors import StoreError, format_count, format_duration, printable
from msn_pretrain.config.load import recipe_as_yaml
from msn_pretrain.config.schedule import settings_at
from msn_pretrain.data.sampler import Order
from msn_pretrain.local_ranks import check_devices, choose_rank_device
from msn_pretrain.training.determinism import deterministic_kernels
from msn_pretrain.training.run import (
    Recipe,
    build_learner,
    find_snapshot,
    makes_views_on_device,
    precision_of,
    training_images,
    view_kinds,
)
from msn_pretrain.training.train import Session, compute, load_session_views, memory_bytes, update

_WARM_UP = 2  # the first of them counts operations
_PRODUCTS = 8
_GIB = 2**30
_EFFICIENCY = 0.3  # of a training step, as a share of the speed of matrix products
_PASSES = 3  # forward passes that cost as much as a forward and a backward pass


def bench(recipe: Recipe, *, steps: int, trace: Path | None = None) -> str:
    """Measure the speed of a recipe.

    Trains 2 + `steps` steps on one device, writes nothing else than `trace`, and returns two lines with the medians of the last
    `steps`: speed and memory, and the parts of a step. Times of parts include waits for the device, so a step is slightly slower
    than in training. Raises what training would.

    Args:
        recipe: The recipe.
        steps: Steps to measure.
        trace: File for a trace of one more step in Chrome's format, None for none.
    """
    ranks = choose_rank_device(ALONE, recipe.run.device.split(",")[0])
    images = training_images(recipe)
    order = Order(n_images=len(images), batch_size=recipe.optimization.batch_size, seed=recipe.run.seed)
    learner = build_learner(recipe, ranks.device)
    timer = _PartTimer(ranks.device)
    session = Session(
        recipe=recipe,
        ranks=ranks,
        run=Path(),
        images=images,
        order=order,
        steps=_WARM_UP + steps + (trace is not None),
        learner=learner,
        mark=timer,
    )
    precision = precision_of(recipe, ranks.device)
    peak = _measure_product_flops(ranks.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    times: list[dict[str, float]] = []
    flops = 0
    timer("data")
    with deterministic_kernels(ranks.device):  # as in training
        for batch in load_session_views(session, 0):
            with ExitStack() as around_step:
                counter = around_step.enter_context(FlopCounterMode(display=False)) if not times else None
                if len(times) == _WARM_UP + steps and trace is not None:
                    around_step.enter_context(_write_trace(trace))
                settings = settings_at(recipe, step=batch.batch.step, steps_per_epoch=order.steps_per_epoch)
                _, numbers = compute(session, batch, settings)
                update(session, numbers, settings)
                flops = flops if counter is None else counter.get_total_flops()
            timer("data")
            times.append(timer.parts)
            timer.parts = {}
    times = times[_WARM_UP : _WARM_UP + steps]
    names = ("data", "forward", "backward", "communication", "optimiser")
    medians = {name: statistics.median(parts.get(name, 0.0) for parts in times) for name in names}
    seconds = sum(medians.values())
    rate = flops / (seconds - medians["data"])
    return (
        f"{order.batch_size / seconds:,.1f} images/s on {ranks.device} in {precision}: "
        f"{medians['data']:.3f} s for views and {seconds - medians['data']:.3f} s for the step, "
        f"medians of {steps} steps of {order.batch_size} images; at most {memory_bytes(ranks.device) / _GIB:.2f} GiB\n"
        + ", ".join(f"{name} {value:.3f} s ({value / seconds:.0%})" for name, value in medians.items())
        + f"; {flops / 1e9:,.0f} GFLOP per step, {rate / 1e9:,.0f} GFLOP/s: "
        f"{rate / peak:.0%} of the {peak / 1e9:,.0f} of matrix products"
    )


class _PartTimer:
    """Adds up the seconds between its calls by the name of the part that each call begins."""

    def __init__(self, device: torch.device) -> None:
        self.parts: dict[str, float] = {}
        self._device, self._running, self._started = device, "data", time.perf_counter()

    def __call__(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.parts[self._running] = self.parts.get(self._running, 0.0) + now - self._started
        self._running, self._started = name, now


@contextmanager
def _write_trace(path: Path) -> Iterator[None]:
    """Write a trace of the body for chrome://tracing or ui.perfetto.dev."""
    from torch.profiler import profile

    with profile() as profiler:
        yield
    try:
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise StoreError(f"cannot be written: {error}", where=str(path), hint="Give --profile another file.") from error


def _measure_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of matrix products of a fixed size, the fastest of several."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(_PRODUCTS):
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def describe(recipe: Recipe, *, allowed: Sequence[str] = (), elsewhere: bool = False) -> str:
    """Return what `--dry-run` prints: the resolved recipe, its size and an estimate of its memory.

    Args:
        recipe: The recipe.
        allowed: Keys of the recipe whose values may differ from those of its folder.
        elsewhere: Whether it would be trained on another machine, which may have other devices.

    Raises:
        MsnEvalError: What training would raise before its first step.
    """
    devices = recipe.run.device.split(",")
    if not elsewhere:
        check_devices(devices)
    device = torch.device(devices[0] if devices[0] != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    images = training_images(recipe)
    order = Order(
        n_images=len(images), batch_size=recipe.optimization.batch_size, seed=recipe.run.seed, world=len(devices)
    )
    find_snapshot(recipe, images, allowed=allowed)
    model = build_learner(recipe, torch.device("cpu")).model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    encoder = sum(parameter.numel() for parameter in model.exported().parameters())
    epochs = recipe.optimization.epochs
    share = math.ceil(recipe.optimization.batch_size / len(devices))
    half = precision_of(recipe, device) == "bf16"
    activations = _activation_bytes(recipe, model.exported(), min(share, recipe.run.micro_batch or share), half=half)
    # float32 weights, and for trained ones a gradient and two moments
    memory = 4 * (total + 3 * trained) + activations
    kinds = ", ".join(f"{kind.count} of {kind.pixels} pixels" for kind in view_kinds(recipe))
    where = "on the device" if makes_views_on_device(recipe, device) else "in the loader"
    lines = [
        recipe_as_yaml(recipe).rstrip(),
        "",
        f"images      {len(images):,} for training, from {recipe.data.root}",
        f"views       {kinds} per image, made {where}",
        f"parameters  {trained:,} trained, {total:,} in total, {encoder:,} in the encoder that is evaluated",
        f"steps       {order.steps_per_epoch * epochs:,}: {format_count(epochs, 'epoch')} of {order.steps_per_epoch}, "
        f"{recipe.optimization.batch_size} images each",
        f"computing   {precision_of(recipe, device)} on {recipe.run.device}",
        f"memory      about {max(memory / _GIB, 0.1):.1f} GiB for each of {format_count(len(devices), 'rank')} (estimate)",
    ]
    if not elsewhere:
        operations = sum(kind.count * _count_operations(model.exported(), kind.pixels) for kind in view_kinds(recipe))
        images_seen = order.steps_per_epoch * epochs * share
        rate = _EFFICIENCY * _measure_product_flops(device, torch.bfloat16 if half else torch.float32)
        seconds = images_seen * _PASSES * operations / rate
        lines.append(
            f"time        about {format_duration(seconds)} if images are read fast enough (estimate; see bench)"
        )
    return printable("\n".join(lines))


def _count_operations(network: nn.Module, pixels: int) -> float:
    """Return the floating-point operations of the forward pass of one view, without dropped patches."""
    blocks, width = getattr(network, "blocks", None), int(getattr(network, "embed_dim", 0))
    if blocks is None or not width:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(network).to("meta")(torch.empty(1, 3, pixels, pixels, device="meta"))
        return float(counter.get_total_flops())
    tokens = (pixels // int(network.patch_embed.patch_size[0])) ** 2 + 1  # type: ignore[index, union-attr]
    weights = sum(parameter.numel() for parameter in blocks.parameters())
    return float(tokens * (2 * weights + 4 * tokens * width * len(blocks)))


def _activation_bytes(recipe: Recipe, network: nn.Module, images: int, *, half: bool) -> int:
    """Estimate the memory that the backward pass needs for `images` images.

    Measured values: a Transformer block keeps about 16 values per token and channel, of 2 bytes in bf16 and 4 in fp32. A residual
    network keeps about 40 MB per image of 224 pixels in bf16, twice that in fp32.
    """
    blocks, width = getattr(network, "blocks", None), int(getattr(network, "embed_dim", 0))
    pixels = sum(kind.count * kind.pixels**2 for kind in view_kinds(recipe))
    if blocks is None or not width:
        return int(images * pixels / 224**2 * 40e6 * (1 if half else 2))
    patch = int(network.patch_embed.patch_size[0])  # type: ignore[index, union-attr]
    return int(images * pixels / patch**2 * len(blocks) * width * 16 * (2 if half else 4))
