"""Kill, terminate or stop a pre-training at random moments and check that the resumed run is bit-identical.

    python tests/faults/kill_training.py [--kills 100] [--seed 0] [--signals KILL TERM STOP] [--break rng|journal|writes]

Each trial starts in an empty folder. A run on 1 or 2 ranks with 0 or 2 loader workers is sent SIGKILL, SIGTERM or SIGSTOP:
alternately in a random fsync of a file that it writes, at a random moment after a random step, and at any moment, also during
start-up. SIGKILL and SIGTERM go to all ranks, or to the first alone if it is in an fsync. SIGSTOP goes to one of the ranks, and
the others must end with 31 within a minute; a run of one rank is continued after a second. The same command then runs to its end.
Weights, target, prototypes, optimiser, generators and metrics.jsonl (except times and memory) must equal those of an undisturbed
run on as many ranks, and no newer snapshot may have been lost.
--break puts a fault into our own code; the trials must detect it. Exits with 0 if every trial passed.
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
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from sync_kill import SyncKill, fork_run, read_counts

import msn_eval.checkpoints.run_folder
import msn_eval.distributed.group
import msn_pretrain.training.journal
import msn_pretrain.training.run
import msn_pretrain.training.snapshot
import msn_pretrain.training.train
from msn_eval.checkpoints.run_folder import newest_snapshot, read_manifest
from msn_eval.data import read_split
from msn_eval.distributed.rank_info import Timeouts
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
_LONGEST_END_SECONDS = 60.0
# Exit codes after each signal. A run may have ended before; SIGTERM may come before Python handles it.
_ALLOWED = {"KILL": {-9, 0}, "TERM": {75, -15, 0}, "STOP": {31, 0}}
BREAKS = ("rng", "journal", "writes")
_SYNCED = ("state.pt", "encoder.safetensors", "manifest.json", METRICS)  # parts of the names of the written files


@dataclass(frozen=True, kw_only=True)
class TimedKill:
    """A signal some seconds after the line of a step, or after the start."""

    step: int
    seconds: float
    number: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.number.name} {self.seconds:.2f} s after {f'step {self.step}' if self.step else 'the start'}"


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """An undisturbed run: its outcome, duration, and number of syncs per file name."""

    outcome: dict[str, Any]
    seconds: float
    syncs: dict[str, int]

    @property
    def steps(self) -> int:
        return int(self.outcome["steps"])


def main() -> int:
    """Run the trials; return 0 if all passed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--break", dest="fault", choices=BREAKS)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--signals", nargs="+", default=list(_ALLOWED), choices=list(_ALLOWED))
    parser.add_argument("--silent-seconds", type=float, help="after which a rank without a heartbeat counts as lost")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {options.kills} kills, seed {options.seed}", flush=True)
    torch.set_num_threads(1)
    if options.silent_seconds:
        msn_eval.distributed.group.Timeouts = partial(Timeouts, silent_seconds=options.silent_seconds)  # type: ignore[misc, assignment]
    chance = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "recipe.yaml").write_text(_RECIPE % options.epochs)
        _import_all(place / "first")
        undisturbed = {ranks: _undisturbed(place, ranks) for ranks in options.ranks}
        if options.fault:
            _break(options.fault)
        shapes = list(product(options.ranks, options.workers))
        for trial in range(options.kills):
            ranks, workers = shapes[trial % len(shapes)]
            number = signal.Signals[f"SIG{options.signals[trial // 3 % len(options.signals)]}"]
            kill = _draw_kill(trial, number, undisturbed[ranks], chance)
            faults, at, seconds = _trial(place / f"trial{trial}", ranks, workers, kill, undisturbed[ranks].outcome)
            failed += bool(faults)
            outcome = "; ".join(faults) or "passed"
            name = f"{trial + 1}: {ranks} ranks, {workers} workers, {kill}"
            print(f"{name}: ended after {seconds:.1f} s, continued from step {at}: {outcome}", flush=True)
            shutil.rmtree(place / f"trial{trial}")
    print(f"{options.kills - failed} of {options.kills} trials passed")
    return 1 if failed else 0


def _import_all(here: Path) -> None:
    """Do a run in this process, so that its forks import nothing."""
    here.mkdir()
    with (here / "stderr").open("w") as output, redirect_stdout(output), redirect_stderr(output):
        code = msn_pretrain_main([*_arguments(here, 0), "optimization.epochs=1"])
    assert code == 0, (here / "stderr").read_text()


def _undisturbed(place: Path, ranks: int) -> Undisturbed:
    here = place / f"undisturbed{ranks}"
    started = time.monotonic()
    codes = _wait(_start(here, ranks, 0))
    assert codes == [0] * ranks, (here / "stderr").read_text()
    seconds = time.monotonic() - started
    outcome = _outcome(here / "run")
    print(f"undisturbed on {ranks}: {seconds:.1f} s, {outcome['steps']} steps", flush=True)
    return Undisturbed(outcome=outcome, seconds=seconds, syncs=read_counts(here / "syncs", _SYNCED))


def _draw_kill(
    trial: int, number: signal.Signals, undisturbed: Undisturbed, chance: random.Random
) -> TimedKill | SyncKill:
    match trial % 3:
        case 0:
            name = _SYNCED[trial // 3 % len(_SYNCED)]
            return SyncKill(name=name, count=chance.randint(1, undisturbed.syncs[name]), number=number)
        case 1:
            seconds = chance.uniform(0, 2 * undisturbed.seconds / undisturbed.steps)
            return TimedKill(step=chance.randrange(1, undisturbed.steps), seconds=seconds, number=number)
        case _:
            step = 1 if number == signal.SIGSTOP else 0  # ranks wait longer for one that has not joined
            return TimedKill(step=step, seconds=chance.uniform(0, 1.1 * undisturbed.seconds), number=number)


def _trial(
    here: Path, ranks: int, workers: int, kill: TimedKill | SyncKill, expected: dict[str, Any]
) -> tuple[list[str], int, float]:
    """Send the signal to a run, start it again, and compare.

    Returns:
        What was wrong, the step that the second run began after, and the seconds until the first had ended.
    """
    if isinstance(kill, SyncKill):
        children = _start(here, ranks, workers, kill)
        signalled = children[:1]  # the first rank alone writes
        if kill.number == signal.SIGSTOP and not os.WIFSTOPPED(os.waitpid(children[0], os.WUNTRACED)[1]):
            return [f"it was not stopped: {(here / 'stderr').read_text()[-400:]}"], 0, 0.0
    else:
        children = _start(here, ranks, workers)
        signalled = children[-1:] if kill.number == signal.SIGSTOP else children
        _wait_for_lines(here / "run" / METRICS, kill.step)
        time.sleep(kill.seconds)
        for child in signalled:
            os.kill(child, kill.number)
    faults, seconds = _end(children, signalled, kill.number)
    if faults:
        faults.append((here / "stderr").read_text()[-400:])
    newest, _ = newest_snapshot(here / "run")
    promised = _promised(here / "run")
    at = newest.step if newest else 0
    if at < promised:
        faults.append(f"a snapshot of step {promised} was complete, but {at} is the newest now")
    codes = _wait(_start(here, ranks, workers))
    if any(codes):
        return [*faults, f"the second run ended with {codes}: {(here / 'stderr').read_text()[-400:]}"], at, seconds
    outcome = _outcome(here / "run")
    faults += [f"{name} differs" for name in expected if not equal(outcome[name], expected[name])]
    return faults, at, seconds


def _end(children: Sequence[int], signalled: Sequence[int], number: signal.Signals) -> tuple[list[str], float]:
    """Wait until the ranks have ended as they must after a signal; return what was wrong, and the seconds."""
    started = time.monotonic()
    rest = [child for child in children if child not in signalled]
    if number == signal.SIGKILL and rest:
        _wait(signalled)
        for child in rest:
            os.kill(child, signal.SIGKILL)
        signalled = []
    elif number == signal.SIGSTOP and not rest:
        time.sleep(1)
        os.kill(children[0], signal.SIGCONT)
    codes = _wait(rest)
    seconds = time.monotonic() - started
    if number == signal.SIGSTOP and rest:
        for child in signalled:
            os.kill(child, signal.SIGKILL)
        _wait(signalled)
    else:
        codes += _wait(signalled)
    allowed = _ALLOWED[number.name.removeprefix("SIG")]
    faults = [] if set(codes) <= allowed else [f"it ended with {codes}"]
    if seconds > _LONGEST_END_SECONDS:
        faults.append(f"it ended after {seconds:.0f} s")
    return faults, seconds


def _wait_for_lines(metrics: Path, count: int) -> None:
    deadline = time.monotonic() + _LONGEST_SECONDS
    while (
        count and time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= count)
    ):
        time.sleep(0.002)


def _promised(run: Path) -> int:
    """Return the step of the newest manifest: a snapshot with a manifest is complete."""
    steps = [read_manifest(path.parent).step for path in run.glob("checkpoints/*/manifest.json")]
    return max(steps, default=0)


def _outcome(run: Path) -> dict[str, Any]:
    """Return all of a finished run that must not depend on interruptions."""
    files, _ = newest_snapshot(run)
    assert files is not None
    state = torch.load(files.state, weights_only=True)
    lines = [
        {name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(run / METRICS)[0]
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


def _arguments(here: Path, workers: int) -> list[str]:
    return [str(here.parent / "recipe.yaml"), f"run.dir={here / 'run'}", f"data.workers={workers}", "-vv"]


def _start(here: Path, ranks: int, workers: int, kill: SyncKill | None = None) -> list[int]:
    """Start the ranks of one run as forked processes; `kill` ends the first."""
    here.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_start_rank(here, rank, ranks, workers, port, kill) for rank in range(ranks)]


def _start_rank(here: Path, rank: int, ranks: int, workers: int, port: int, kill: SyncKill | None) -> int:
    def run() -> int:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return msn_pretrain_main(_arguments(here, workers))

    return fork_run(here, run, kill if rank == 0 else None)


def _wait(children: Sequence[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _break(fault: str) -> None:
    """Break our own code."""
    if fault == "rng":
        msn_pretrain.training.snapshot.set_generators = lambda states, device: None
    elif fault == "journal":
        msn_pretrain.training.journal.truncate_metrics = lambda path, *, step: None
    else:
        _tear_writes()


def _tear_writes() -> None:
    """Write in place and slowly, the manifest first, and accept every manifest."""

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

    msn_pretrain.training.snapshot.written_atomically = in_place  # type: ignore[attr-defined]
    for module in (msn_eval.checkpoints.run_folder, msn_pretrain.training.snapshot):
        module.check_snapshot = read_manifest  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
