"""SIGKILL at random instants of a pre-training, and whether what it becomes is still what it would have become, bit by bit.

    python tests/faults/kill_training.py [--kills 50] [--seed 0] [--break rng|journal|writes]

Each trial starts from nothing: a run on 1 or 2 ranks with 0 or 2 loader workers is killed, every rank of it, by turns at a random
instant behind a random step, in a random sync of a file that it is writing, and at any instant, while it starts up too; and the
same command then runs to its end. Weights, target, prototypes, optimiser, generators and metrics.jsonl (times and
memory apart) must be those of an undisturbed run of as many ranks, and no newer snapshot may have been lost.
--break puts a fault into our own code on purpose; the trials must see it. Ends with 0 where every trial was sound.
One process imports everything, by doing such a run itself, and forks the ranks, so that a trial takes seconds.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from sync_kill import SyncKill, die_in_sync, note_syncs, read_counts

import msn_eval.checkpoints.run_folder
import msn_pretrain.training.journal
import msn_pretrain.training.run
import msn_pretrain.training.snapshot
import msn_pretrain.training.train
from msn_eval.checkpoints.run_folder import SnapshotFiles, newest_snapshot, read_manifest
from msn_eval.data import read_split
from msn_pretrain.cli import main as msn_pretrain_main
from msn_pretrain.training.journal import METRICS, TIMING, read_metrics
from msn_pretrain.training.run import data_sha256
from msn_pretrain.training.snapshot import equal

_RECIPE = """
run: {device: cpu, seed: 3, log_every: 1, snapshot_minutes: 0.0001, attention: explicit}
data: {root: digits, limit: 4}
views: {image_pixels: 16, focal_pixels: 8, focal_views: 2, focal_crop_scale: [0.2, 0.6]}
encoder: {name: "vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=2&num_heads=2", drop_path: 0.2}
head: {hidden: 32, output: 16}
masking: {ratio: 0.3, per_image: true}
criterion: {prototypes: 16}
optimization: {epochs: %d, batch_size: 8, warmup: 1}
ema: {start: 0.9}
"""
_LONGEST_SECONDS = 120.0
BREAKS = ("rng", "journal", "writes")
_SYNCED = (
    "state.pt",
    "encoder.safetensors",
    "manifest.json",
    METRICS,
)  # what the names of the files hold that are written


@dataclass(frozen=True, kw_only=True)
class TimedKill:
    """Death some seconds behind the line of a step, or behind the start."""

    step: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s behind {f'step {self.step}' if self.step else 'the start'}"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """An undisturbed run: what became of it, how long it took, and how often it synced files of each name."""

    outcome: dict[str, Any]
    seconds: float
    syncs: dict[str, int]

    @property
    def steps(self) -> int:
        return int(self.outcome["steps"])


def main() -> int:
    """Run the trials; give 0 if all were sound, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--break", dest="fault", choices=BREAKS)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {options.kills} kills, seed {options.seed}", flush=True)
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    unsound = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "recipe.yaml").write_text(_RECIPE % options.epochs)
        _import_all(place / "first")
        whole = {ranks: _undisturbed(place, ranks) for ranks in options.ranks}
        if options.fault:
            _break(options.fault)
        shapes = list(product(options.ranks, options.workers))
        for trial in range(options.kills):
            ranks, workers = shapes[trial % len(shapes)]
            kill = _drawn(trial, whole[ranks], chance)
            faults, at = _trial(place / f"trial{trial}", ranks, workers, kill, whole[ranks].outcome)
            unsound += bool(faults)
            told = "; ".join(faults) or "sound"
            print(f"kill {trial + 1}, {kill}, from step {at}, {ranks} ranks, {workers} workers: {told}", flush=True)
            shutil.rmtree(place / f"trial{trial}")
    print(f"{options.kills - unsound} of {options.kills} trials sound")
    return 1 if unsound else 0


def _import_all(here: Path) -> None:
    """Do a run in this process: its forks then need to import nothing."""
    here.mkdir()
    with (here / "stderr").open("w") as output, redirect_stdout(output), redirect_stderr(output):
        code = msn_pretrain_main([*_words(here, 0), "optimization.epochs=1"])
    assert code == 0, (here / "stderr").read_text()


def _undisturbed(place: Path, ranks: int) -> Whole:
    here = place / f"whole{ranks}"
    started = time.monotonic()
    codes = _wait(_start(here, ranks, 0))
    assert codes == [0] * ranks, (here / "stderr").read_text()
    seconds = time.monotonic() - started
    found = _outcome(here / "run")
    print(f"undisturbed on {ranks}: {seconds:.1f} s, {found['steps']} steps", flush=True)
    return Whole(outcome=found, seconds=seconds, syncs=read_counts(here / "syncs", _SYNCED))


def _drawn(trial: int, whole: Whole, chance: random.Random) -> TimedKill | SyncKill:
    match trial % 3:
        case 0:
            name = _SYNCED[trial // 3 % len(_SYNCED)]
            return SyncKill(name=name, count=chance.randint(1, whole.syncs[name]))
        case 1:
            seconds = chance.uniform(0, 2 * whole.seconds / whole.steps)
            return TimedKill(step=chance.randrange(1, whole.steps), seconds=seconds)
        case _:
            return TimedKill(step=0, seconds=chance.uniform(0, 1.1 * whole.seconds))


def _trial(
    here: Path, ranks: int, workers: int, kill: TimedKill | SyncKill, expected: dict[str, Any]
) -> tuple[list[str], int]:
    """Kill a run, start it again, and compare."""
    if isinstance(kill, SyncKill):
        children = _start(here, ranks, workers, kill)
        if _wait(children[:1]) != [-signal.SIGKILL]:  # the first rank alone writes
            return [f"it was not killed: {(here / 'stderr').read_text()[-400:]}"], 0
        children = children[1:]
    else:
        children = _start(here, ranks, workers)
        _wait_for_lines(here / "run" / METRICS, kill.step)
        time.sleep(kill.seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)
    _wait(children)
    found, _ = newest_snapshot(here / "run")
    promised = _promised(here / "run")
    at = found.step if found else 0
    faults = [] if at >= promised else [f"a snapshot of step {promised} was whole, and {at} is the newest now"]
    codes = _wait(_start(here, ranks, workers))
    if any(codes):
        return [*faults, f"the second run ended with {codes}: {(here / 'stderr').read_text()[-400:]}"], at
    outcome = _outcome(here / "run")
    faults += [f"{name} differs" for name in expected if not equal(outcome[name], expected[name])]
    return faults, at


def _wait_for_lines(metrics: Path, count: int) -> None:
    until = time.monotonic() + _LONGEST_SECONDS
    while count and time.monotonic() < until and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= count):
        time.sleep(0.002)


def _promised(run: Path) -> int:
    """Give the step of the newest manifest: what has one was finished."""
    steps = [read_manifest(path.parent).step for path in run.glob("checkpoints/*/manifest.json")]
    return max(steps, default=0)


def _outcome(run: Path) -> dict[str, Any]:
    """Give all of a finished run that must not depend on how it went."""
    files, _ = newest_snapshot(run)
    assert files is not None
    state = torch.load(files.state, weights_only=True)
    lines = [
        {name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(run / METRICS)
    ]
    written = len((run / METRICS).read_text().splitlines())
    return {
        "model": state["model"],
        "optimizer": state["optimizer"],
        "rng": state["rng"],
        "watched": state["watched"],
        "encoder": files.files["encoder.safetensors"],
        "steps": files.step,
        "metrics": json.dumps(lines),
        "lines": written,
    }


def _words(here: Path, workers: int) -> list[str]:
    return [str(here.parent / "recipe.yaml"), f"run.dir={here / 'run'}", f"data.workers={workers}", "-vv"]


def _start(here: Path, ranks: int, workers: int, kill: SyncKill | None = None) -> list[int]:
    """Start the ranks of one run as forked processes, whose first dies as `kill` says."""
    here.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_start_rank(here, rank, ranks, workers, port, kill) for rank in range(ranks)]


def _start_rank(here: Path, rank: int, ranks: int, workers: int, port: int, kill: SyncKill | None) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(here / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        note_syncs(here / "syncs")
        if kill is not None and rank == 0:
            die_in_sync(kill)
        code = msn_pretrain_main(_words(here, workers))
    finally:
        os._exit(code)


def _wait(children: Sequence[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _break(fault: str) -> None:
    """Put a fault into our own code."""
    if fault == "rng":
        msn_pretrain.training.snapshot.set_generators = lambda states, device: None
    elif fault == "journal":
        msn_pretrain.training.journal.cut = lambda path, *, step: None
    else:
        _tear_writes()


def _tear_writes() -> None:
    """Write in place and slowly, the manifest first, and believe every manifest."""

    known = data_sha256(read_split("digits", "train").first_of_each_class(4))

    @contextmanager
    def in_place(path: Path, what: str) -> Iterator[Path]:
        (path.parent / "manifest.json").write_text(
            json.dumps(
                {"schema": 1, "step": int(path.parent.name.partition("-")[2]), "epoch": 0, "world": 1}
                | {"files": {"encoder.safetensors": "", "state.pt": ""}, "data_sha256": known}
            )
        )
        yield path
        content = path.read_bytes()
        with path.open("wb", buffering=0) as file:
            for piece in range(8):
                file.write(content[len(content) * piece // 8 : len(content) * (piece + 1) // 8])
                time.sleep(0.03)
                if piece == 4:
                    os.fsync(file.fileno())

    def believed(folder: Path) -> SnapshotFiles:
        return read_manifest(folder)

    msn_pretrain.training.snapshot.written_atomically = in_place  # type: ignore[attr-defined]
    for module in (msn_eval.checkpoints.run_folder, msn_pretrain.training.snapshot):
        module.check_snapshot = believed  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
