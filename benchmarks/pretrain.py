"""The pre-training step against a plain implementation of the paper and against lightly's MSN components: ratios in one run.

    python benchmarks/pretrain.py [--encoders vit_tiny_patch16_224,vit_small_patch16_224] [--batch 8] [--rounds 5]
    python benchmarks/pretrain.py --ranks --out reports/benchmarks/pretrain.md        # also two gloo ranks on two cores

MSN as in configs/pretrain/msn_vits16.yaml: one target view and one random anchor view of 224 pixels, ten focal views of 96. A
step is normalising given views, forward, backward, clipping, AdamW and the moving average; loading is not part of it. All take
turns on the same views in this process with one thread, and CPU time is measured, since other programs may share the machine.
The process keeps freed memory, as `msn-pretrain` does; this makes all of them faster.
Ratios above 1: ours is faster. `plain` is benchmarks/plain/network.py in fp32. `lightly` is its MaskedVisionTransformerTIMM,
MSNProjectionHead and MSNLoss with update_momentum and torch's AdamW in fp32, as in its example; its head has the shape of ours.
--ranks measures the same global batch on one rank and on two, in turns, with one process per rank on a core of its own: wall
time, and the processor time of the rank that used most, without what it waits for the other one or for other programs.
"""

import argparse
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain.network import PlainMSN, VisionTransformer, build_adamw, projection_head, take_step
from torch import Tensor, nn

from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.distributed.group import ALONE, Group, join_group
from msn_eval.process import keep_freed_memory
from msn_pretrain.config.load import read_recipe
from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.data.sampler import Batch, Order
from msn_pretrain.data.view_loader import ViewBatch, normalise
from msn_pretrain.methods.msn import MSN
from msn_pretrain.training.run import build_learner
from msn_pretrain.training.train import Session, compute, update

_CPU = torch.device("cpu")
_SIZES = {"vit_tiny_patch16_224": (192, 12, 3), "vit_small_patch16_224": (384, 12, 6)}
_RECIPE = Path(__file__).parents[1] / "configs" / "pretrain" / "msn_vits16.yaml"
_SETTINGS = StepSettings(
    learning_rate=1e-4, fixed_learning_rate=1e-4, weight_decay=0.04, ema=0.996, sharpening=0.25
)  # fmt: skip
_RANKS_BATCH, _RANKS_ROUNDS = 8, 3
Step = Callable[[int], object]


def main() -> None:
    """Print the lines, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", default=",".join(_SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="measure ours without the opponents, in these precisions: fp32,bf16")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of our recipe")
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = [
        "# Pre-training step on CPU cores",
        "",
        _describe_machine(),
        "",
        f"Command: `{_describe_command(options)}`",
        "",
    ]
    for line in lines:
        print(line)
    for name in options.encoders.split(","):
        for line in _compare(name, options):
            lines.append(line)
            print(line, flush=True)
    if options.ranks:
        for name in options.encoders.split(","):
            lines.append(_compare_ranks(name, options.override))
            print(lines[-1], flush=True)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written: {options.out}")


def _describe_command(options: argparse.Namespace) -> str:
    ranks = " --ranks" if options.ranks else ""
    return f"python benchmarks/pretrain.py --encoders {options.encoders} --batch {options.batch} --rounds {options.rounds}{ranks}"


def _describe_machine() -> str:
    """Return processor, its matrix instructions, versions, and the speed of matrix products on one thread."""
    import lightly
    import timm

    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.partition(": ")[2] for line in cpuinfo.splitlines() if line.startswith("model name")), platform.machine()
    )
    has = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in cpuinfo]
    speeds = ", ".join(f"{name} {_product_flops(dtype) / 1e9:,.0f}" for name, dtype in _DTYPES.items())
    return (
        f"{model}, {', '.join(has) or 'no AVX-512'}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, timm {timm.__version__}, lightly {lightly.__version__}, Python {platform.python_version()}. "
        f"Products of 1024 x 1536 x 384 on one thread in GFLOP/s: {speeds}."
    )


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _product_flops(dtype: torch.dtype) -> float:
    left, right = torch.randn(1024, 1536).to(dtype), torch.randn(1536, 384).to(dtype)
    seconds = []
    for _ in range(10):
        started = time.process_time()
        for _ in range(5):
            left @ right
        seconds.append((time.process_time() - started) / 5)
    return 2 * 1024 * 1536 * 384 / min(seconds)


def _read(name: str, precision: str, batch: int, overrides: Sequence[str] = ()) -> MSNRecipe:
    recipe = read_recipe(
        _RECIPE,
        overrides=[f"encoder.name={name}", f"run.precision={precision}", f"optimization.batch_size={batch}",
                   "run.device=cpu", "data.root=digits", *overrides],
    )  # fmt: skip
    assert isinstance(recipe, MSNRecipe)
    return recipe


def _draw_views(recipe: MSNRecipe, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = recipe.views
    counts = ((1 + views.random_views, views.image_pixels), (views.focal_views, views.focal_pixels))
    return [
        torch.randint(0, 256, (n * batch, 3, side, side), generator=generator, dtype=torch.uint8) for n, side in counts
    ]


def _ours(recipe: MSNRecipe, views: Sequence[Tensor], group: Group = ALONE) -> Step:
    images = len(views[0]) // (1 + recipe.views.random_views)
    session: Any = Session(
        recipe=recipe, ranks=group, run=Path(), images=None, steps=10**9,  # type: ignore[arg-type]
        order=Order(n_images=10**6, batch_size=images * group.world, seed=0, world=group.world),
        learner=build_learner(recipe, _CPU),
    )  # fmt: skip

    def step(number: int) -> object:
        batch = Batch(step=number, epoch=0, images=np.arange(images))
        _, numbers = compute(session, ViewBatch(batch=batch, views=tuple(views)), _SETTINGS)
        return update(session, numbers, _SETTINGS)

    return step


def _split(views: Sequence[Tensor], batch: int) -> list[Tensor]:
    return [view for kind in views for view in torch.split(normalise(kind, IMAGENET_MEAN, IMAGENET_STD), batch)]


def _draw_kept(recipe: MSNRecipe) -> Tensor:
    patches = (recipe.views.image_pixels // 16) ** 2
    return torch.randperm(patches)[: int(patches * (1 - recipe.masking.ratio))].sort().values


def _plain(recipe: MSNRecipe, views: Sequence[Tensor], batch: int) -> Step:
    width, depth, heads = _SIZES[recipe.encoder.name]
    encoder = VisionTransformer(pixels=recipe.views.image_pixels, patch=16, width=width, depth=depth, heads=heads)
    head = projection_head(width, hidden=recipe.head.hidden, output=recipe.head.output)
    model = PlainMSN(encoder, head, torch.zeros(recipe.criterion.prototypes, recipe.head.output))
    own = build_learner(recipe, _CPU).model
    assert isinstance(own, MSN)
    model.load(own.state_dict())
    optimizer = build_adamw(model)
    return lambda number: take_step(
        model, optimizer, _split(views, batch), _draw_kept(recipe), random_views=recipe.views.random_views,
        learning_rate=_SETTINGS.learning_rate, weight_decay=_SETTINGS.weight_decay, decay=_SETTINGS.ema,
        temperature=recipe.criterion.temperature, sharpening=_SETTINGS.sharpening, clip=recipe.optimization.clip,
    )  # fmt: skip


def _lightly(recipe: MSNRecipe, views: Sequence[Tensor], batch: int) -> Step:
    import copy

    import timm
    from lightly.loss import MSNLoss
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.heads import MSNProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    network = timm.create_model(recipe.encoder.name, dynamic_img_size=True, num_classes=0)
    anchor = nn.ModuleList(
        [
            MaskedVisionTransformerTIMM(vit=network),
            MSNProjectionHead(network.embed_dim, recipe.head.hidden, recipe.head.output),
        ]
    )
    target = copy.deepcopy(anchor)
    deactivate_requires_grad(target)
    prototypes = nn.Parameter(torch.randn(recipe.criterion.prototypes, recipe.head.output))
    criterion = MSNLoss()
    optimizer = torch.optim.AdamW([*anchor.parameters(), prototypes], lr=_SETTINGS.learning_rate)

    def step(number: int) -> object:
        update_momentum(anchor, target, _SETTINGS.ema)
        first, *others = _split(views, batch)
        kept = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + _draw_kept(recipe)]).expand(batch, -1)
        targets = target[1](target[0](images=first))
        random_views, focal = others[: recipe.views.random_views], torch.cat(others[recipe.views.random_views :])
        outputs = [anchor[1](anchor[0](images=view, idx_keep=kept)) for view in random_views]
        outputs.append(anchor[1](anchor[0](images=focal)))
        loss = criterion(torch.cat(outputs), targets, prototypes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(anchor.parameters(), recipe.optimization.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _compare(name: str, options: argparse.Namespace) -> list[str]:
    """Return lines about one encoder."""
    fp32, bf16 = (_read(name, precision, options.batch, options.override) for precision in _DTYPES)
    views = _draw_views(fp32, options.batch)
    steps: dict[str, Step] = {"ours fp32": _ours(fp32, views), "ours bf16": _ours(bf16, views)}
    if options.only:
        steps = {f"ours {precision}": steps[f"ours {precision}"] for precision in options.only.split(",")}
    else:
        steps |= {
            "plain fp32": _plain(fp32, views, options.batch),
            "lightly fp32": _lightly(fp32, views, options.batch),
        }
    seconds: dict[str, list[float]] = {who: [] for who in steps}
    for number in range(options.rounds + 1):
        for who, step in steps.items():
            started = time.process_time()
            step(number)
            seconds[who].append(time.process_time() - started)
    seconds = {who: values[1:] for who, values in seconds.items()}
    lines = [
        f"## {name}, batch {options.batch}, one thread",
        "",
        "| step | CPU seconds, median | images/s | ours fp32 / it | ours bf16 / it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for who, values in seconds.items():
        median = statistics.median(values)
        row = [who, f"{median:.3f}", f"{options.batch / median:.2f}"]
        row += [_ratio(values, seconds.get(own, [])) for own in ("ours fp32", "ours bf16")]
        lines.append("| " + " | ".join(row) + " |")
    return [*lines, ""]


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=False))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""


def _compare_ranks(name: str, overrides: Sequence[str]) -> str:
    """Return a line about two ranks on two cores against one rank on one core, with the same global batch."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank, world, core in ((0, 1, 0), (0, 2, 0), (1, 2, 1)):
        pipe, end = context.Pipe()
        processes.append(context.Process(target=_serve, args=(end, name, rank, world, core, port, tuple(overrides))))
        processes[-1].start()
        end.close()  # so that the end of a rank ends this program too
        pipes.append(pipe)
    one, *two = pipes
    pairs = [(_take_step([one]), _take_step(two)) for _ in range(_RANKS_ROUNDS + 1)][1:]
    load = os.getloadavg()[0]
    for pipe in pipes:
        pipe.send(False)
    for process in processes:
        process.join()
    parts = []
    for number, kind in enumerate(("wall time", "processor time")):
        alone, both = ([step[number] for step in steps] for steps in zip(*pairs, strict=True))
        medians = f"one rank {statistics.median(alone):.3f} s, two ranks {statistics.median(both):.3f} s"
        parts.append(f"{kind}: {medians}, ratio {_ratio(alone, both)}")
    return (
        f"{name} fp32, {_RANKS_BATCH} images per step, medians of {_RANKS_ROUNDS} steps in turns; {'; '.join(parts)}; "
        f"load {load:.1f}"
    )


def _take_step(pipes: Sequence[Any]) -> tuple[float, float]:
    """Let ranks take a step; return the wall time, and the processor time of the rank that used most."""
    started = time.perf_counter()
    for pipe in pipes:
        pipe.send(True)
    used = max(pipe.recv() for pipe in pipes)
    return time.perf_counter() - started, used


def _serve(
    pipe: Connection, name: str, rank: int, world: int, core: int, port: int, overrides: tuple[str, ...]
) -> None:
    """Take one step per message on one core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()
    facts = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {key: str(value) for key, value in facts.items()} if world > 1 else {}
    with join_group(environment=environment) as group:
        recipe = _read(name, "fp32", _RANKS_BATCH, overrides)
        step, number = _ours(recipe, _draw_views(recipe, _RANKS_BATCH // world), group), 0
        while pipe.recv():
            started = time.process_time()
            step(number)
            pipe.send(time.process_time() - started)
            number += 1


if __name__ == "__main__":
    main()
