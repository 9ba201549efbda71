"""Kill an evaluation with SIGKILL at random moments and check that nothing is lost, torn or changed.

    python tests/faults/kill_evaluation.py --data FOLDER [--kills 100] [--seed 0] [--torn-writes]

Each trial starts in an empty folder. A run is killed, alternately at a random moment and in a random fsync of a file that it
writes. Its files are checked, and the same command then runs to its end. The records must equal those of an undisturbed run
(except times and environment), every file under a final name must be complete, nothing may be quarantined, and no more images
than a shard and a batch may be encoded twice. --torn-writes breaks our writing deliberately: files then grow under their final
names, and the trials must detect that.
Exits with 0 if every trial passed. One process imports everything, by doing the undisturbed run itself, and forks the others, so
that a trial takes a second or two.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from sync_kill import SyncKill, fork_run, read_counts
from torch import Tensor

import msn_eval.data.hashing
import msn_eval.features.cache
import msn_eval.features.extraction
import msn_eval.files.atomic
import msn_eval.results.record
from msn_eval.cli import main as msn_eval_main
from msn_eval.features.cache import list_feature_folders, read_manifests, read_rows
from msn_eval.features.encoder import Encoder, encode

_NETWORK = "random:vit_tiny_patch16_224?img_size=32&patch_size=16&depth=2"
_BATCH, _SHARD_ROWS = 32, 128
_LEFT_OUT = ("created", "timing_s", "environment", "seal")
_SYNCED = (".json", ".npz", ".safetensors")  # parts of the names of the written files


def main() -> int:
    """Run the trials; return 0 if all passed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torn-writes", action="store_true")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {options.kills} kills, seed {options.seed}", flush=True)
    msn_eval.features.extraction._CPU_SHARD_ROWS = _SHARD_ROWS  # type: ignore[attr-defined]
    chance = random.Random(options.seed)
    failed = 0
    if options.torn_writes:
        _tear_writes()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        (Path(folder) / "first").mkdir()
        _run_here(Path(folder) / "first", options.data)  # imports all that a run does
        started = time.monotonic()
        code, images = _run_to_the_end(undisturbed, options.data)
        seconds = time.monotonic() - started
        assert code == 0, (undisturbed / "stderr").read_text()
        expected, syncs = _records(undisturbed), read_counts(undisturbed / "syncs", _SYNCED)
        print(f"undisturbed: {seconds:.1f} s, {images} images encoded, {len(expected)} results", flush=True)
        for trial in range(options.kills):
            here = Path(folder) / f"trial{trial}"
            if trial % 2:
                name = _SYNCED[trial // 2 % len(_SYNCED)]
                kill = SyncKill(name=name, count=chance.randint(1, syncs[name]))
            else:
                kill = chance.uniform(0, 1.02 * seconds)
            faults = _trial(here, options.data, kill, images, expected)
            shutil.rmtree(here)
            failed += bool(faults)
            when = f"at {kill:.2f} s" if isinstance(kill, float) else str(kill)
            print(f"kill {trial + 1} {when}: {'; '.join(faults) or 'passed'}", flush=True)
    print(f"{options.kills - failed} of {options.kills} trials passed")
    return 1 if failed else 0


def _trial(here: Path, data: str, kill: float | SyncKill, images: int, expected: dict[str, object]) -> list[str]:
    if isinstance(kill, SyncKill):
        status = os.waitpid(_start(here, data, kill), 0)[1]
        if not os.WIFSIGNALED(status):
            return [f"it was not killed: {(here / 'stderr').read_text()[-300:]}"]
    else:
        child = _start(here, data)
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    faults = _torn_files(here)
    finished_before = set(_records(here)) if not faults else set()
    code, encoded = _run_to_the_end(here, data)
    if code != 0:
        return [*faults, f"the second run ended with {code}: {(here / 'stderr').read_text()[-300:]}"]
    records = _records(here)
    if records != expected:
        different = [name for name in expected if records.get(name) != expected[name]]
        faults.append(f"{len(different)} results differ, first {different[:1]}")
    if missing := finished_before - set(records):
        faults.append(f"{len(missing)} finished results are gone")
    if "quarantine" in (here / "stderr").read_text():
        faults.append("something was quarantined")
    if os.WIFSIGNALED(status) and encoded > images + _SHARD_ROWS + 2 * _BATCH:
        faults.append(f"{encoded - images} images were encoded twice")
    return faults


def _run_to_the_end(here: Path, data: str) -> tuple[int, int]:
    """Return the exit code, and the number of images that all runs in this folder have encoded."""
    status = os.waitpid(_start(here, data), 0)[1]
    counts = (here / "encoded").read_bytes() if (here / "encoded").exists() else b""
    return os.waitstatus_to_exitcode(status), sum(int(line) for line in counts.split())


def _start(here: Path, data: str, kill: SyncKill | None = None) -> int:
    """Start the evaluation in a forked process, which `kill` ends."""
    here.mkdir(exist_ok=True)

    def run() -> int:
        with _counted(here / "encoded"):
            return _run_here(here, data)

    return fork_run(here, run, kill)


def _run_here(here: Path, data: str) -> int:
    torch.set_num_threads(1)
    with (here / "stderr").open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return msn_eval_main(
            [
                "--checkpoint", _NETWORK, "--data", data, "--subset", "1img,2imgs@1", "--probe", "logistic,knn",
                "--k", "5", "--limit", "8", "--batch-size", str(_BATCH), "--workers", "0",
                "--out", str(here / "runs"), "--cache", str(here / "cache"), "--json",
            ]
        )  # fmt: skip


@contextlib.contextmanager
def _counted(file: Path) -> Iterator[None]:
    """Append a line to `file` for every encoded batch."""

    def counting(encoder: Encoder, pixels: Tensor, taps: list[str]) -> dict[str, Tensor]:
        with file.open("ab", buffering=0) as counter:
            counter.write(b"%d\n" % len(pixels))
        return encode(encoder, pixels, taps)

    msn_eval.features.extraction.encode = counting  # type: ignore[attr-defined, assignment]
    yield


def _records(here: Path) -> dict[str, object]:
    """Return every result with the bytes of its predictions, without the fields that may differ."""
    records: dict[str, object] = {}
    for path in sorted((here / "runs").glob("*.json")):
        record = json.loads(path.read_bytes())
        for name in _LEFT_OUT:
            del record[name]
        records[path.name] = (record, (path.parent / record["predictions"]).read_bytes())
    return records


def _torn_files(here: Path) -> list[str]:
    """List the files under a final name that are not complete."""
    torn = []
    checks: list[tuple[str, Callable[[Path], object]]] = [
        ("runs/*.json", lambda path: json.loads(path.read_bytes())),
        ("runs/*.npz", _read_arrays),
        ("cache/hashes/*", lambda path: json.loads(path.read_bytes())),
        ("cache/features/*/*.json", lambda path: json.loads(path.read_bytes())),
    ]
    for pattern, read in checks:
        for path in here.glob(pattern):
            try:
                read(path)
            except Exception as error:
                torn.append(f"{path.relative_to(here)} is torn ({type(error).__name__})")
    for path in here.glob("cache/features/*/*.safetensors"):  # called by their own hash
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem):
            torn.append(f"{path.relative_to(here)} is torn")
    for folder in list_feature_folders(here / "cache"):
        for manifest in list(read_manifests(folder)):
            if not all(read_rows(folder, manifest.contents)[1]):
                torn.append(f"{manifest.shard} is torn")
    return torn


def _read_arrays(path: Path) -> None:
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays:
            arrays[name]


def _tear_writes() -> None:
    """Replace atomic writing by slow writing in place."""

    def write_in_place(path: Path, content: bytes) -> None:
        with path.open("wb", buffering=0) as file:
            piece = -(-len(content) // 8)
            for start in range(0, len(content), piece):
                file.write(content[start : start + piece])
                if start <= len(content) // 2 < start + piece:
                    os.fsync(file.fileno())
                time.sleep(0.003)

    for module in (msn_eval.files.atomic, msn_eval.features.cache, msn_eval.data.hashing, msn_eval.results.record):
        module.write_atomically = write_in_place  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
