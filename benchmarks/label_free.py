"""Train small networks on the digits and measure how well label-free statistics order their snapshots.

    python benchmarks/label_free.py train WORK     # 8 runs of 20 epochs: about six minutes of one idle core
    python benchmarks/label_free.py report WORK    # evaluates the snapshots and prints the tables of reports/label_free.md

A run is `configs/pretrain/msn_digits.yaml`, shortened, with one setting changed. Its snapshots after 5, 10, 15 and 20 epochs
are evaluated with 1 and 5 labelled images per class. Accuracies are those of logistic regression at the tap `cls`; `rankme` and
`alpha` are the fields of the same records, computed from the features of the 797 validation images.

The interval of a Spearman correlation is a percentile bootstrap over runs: snapshots of one run are not independent.
"""

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from msn_eval import evaluate

_CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "msn_digits.yaml"
_SHORT = ("optimization.epochs=20", "optimization.warmup=2", "run.keep_every=5", "watch.on_alarm=warn")
_EPOCHS = (5, 10, 15, 20)
_STEPS_PER_EPOCH = 15
_DRAWS = 2000
_RUNS: dict[str, tuple[str, ...]] = {
    "default, seed 0": (),
    "default, seed 1": ("run.seed=1",),
    "default, seed 2": ("run.seed=2",),
    "no me-max, seed 0": ("criterion.me_max_weight=0",),
    "no me-max, seed 1": ("criterion.me_max_weight=0", "run.seed=1"),
    "no me-max, no Sinkhorn": ("criterion.me_max_weight=0", "criterion.sinkhorn_iterations=0"),
    "learning rate / 10": ("optimization.learning_rate=1.5e-4", "optimization.start_learning_rate=2e-5"),
    "learning rate x 5": ("optimization.learning_rate=7.5e-3",),
}


def main() -> None:
    """Train the runs, or print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "report"))
    parser.add_argument("work", type=Path)
    options = parser.parse_args()
    if options.action == "train":
        train(options.work)
    else:
        print(format_report(measure(options.work)))


def train(work: Path) -> None:
    """Train every run. A finished one is left as it is."""
    for number, settings in enumerate(_RUNS.values()):
        program = [sys.executable, "-m", "msn_pretrain", str(_CONFIG), f"run.dir={work / f'run{number}'}"]
        subprocess.run([*program, *_SHORT, *settings], check=True)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A snapshot: its run, its epoch, its label-free statistics, and accuracies with 1 and 5 images per class."""

    run: str
    epoch: int
    rankme: float
    alpha: float
    one: float
    five: float


def measure(work: Path) -> list[Snapshot]:
    """Evaluate the snapshots that there are."""
    snapshots = []
    for number, name in enumerate(_RUNS):
        for epoch in _EPOCHS:
            folder = work / f"run{number}" / "checkpoints" / f"step-{_STEPS_PER_EPOCH * epoch:08d}"
            if not (folder / "manifest.json").exists():
                print(f"{name}: no snapshot after {epoch} epochs", file=sys.stderr)
                break
            checkpoint = str(folder / "encoder.safetensors")
            results = evaluate(checkpoint, data="digits", subsets=["1img", "5imgs"], out=work / "eval", device="cpu")
            features = results[0].features
            assert features.rankme is not None
            assert features.alpha is not None
            one, five = (
                statistics.fmean(r.metrics.top1 for r in results if r.metrics and r.split.subset == subset)
                for subset in ("1img", "5imgs")
            )
            snapshots.append(
                Snapshot(run=name, epoch=epoch, rankme=features.rankme, alpha=features.alpha, one=one, five=five)
            )
    return snapshots


def correlate(snapshots: Sequence[Snapshot], statistic: str, accuracy: str) -> tuple[float, float, float]:
    """Return Spearman's correlation and its 95 % interval, a percentile bootstrap over runs with a fixed seed."""
    runs = list(dict.fromkeys(snapshot.run for snapshot in snapshots))
    generator = np.random.default_rng(0)

    def compute(chosen: Sequence[str]) -> float:
        some = [snapshot for run in chosen for snapshot in snapshots if snapshot.run == run]
        ranks = [rankdata([getattr(one, name) for one in some]) for name in (statistic, accuracy)]
        return math.nan if 0 in (np.ptp(ranks[0]), np.ptp(ranks[1])) else float(np.corrcoef(ranks)[0, 1])

    drawn = [compute([runs[index] for index in generator.integers(len(runs), size=len(runs))]) for _ in range(_DRAWS)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return compute(runs), float(low), float(high)


def format_report(snapshots: Sequence[Snapshot]) -> str:
    """Return the tables in Markdown."""
    last = list({snapshot.run: snapshot for snapshot in snapshots}.values())
    lines = ["| run | epoch | RankMe | alpha | 1 image | 5 images |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {s.run} | {s.epoch} | {s.rankme:.2f} | {s.alpha:.2f} | {100 * s.one:.1f} | {100 * s.five:.1f} |"
        for s in snapshots
    ]
    lines += [
        "",
        "| snapshots | statistic | accuracy with | Spearman | 95 % interval |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for title, some in ((f"all, n = {len(snapshots)}", snapshots), (f"the last of each run, n = {len(last)}", last)):
        for statistic in ("rankme", "alpha"):
            for accuracy, images in (("one", "1 image"), ("five", "5 images")):
                value, low, high = correlate(some, statistic, accuracy)
                lines.append(f"| {title} | {statistic} | {images} | {value:+.2f} | [{low:+.2f}, {high:+.2f}] |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
