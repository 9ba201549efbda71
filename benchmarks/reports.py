"""Measure the time to rerun a finished evaluation, to read thousands of records, and to write them as a table and as a page.

Each runs in a separate process; `torch` only imports PyTorch, which every evaluation does.

    python benchmarks/reports.py [--checkpoints 1000] [--rounds 3]

The records are those of raw pixels on the digits under 12 protocols, copied for invented checkpoints with different
hashes, scores and times. Each has the predictions of the original, and states their hash: every reader compares it.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from msn_eval.files.json_records import add_seal
from msn_eval.results.record import result_id
from msn_eval.results.statistics import wilson_interval

_PROTOCOLS = 12
_EVALUATE = [
    sys.executable, "-m", "msn_eval", "-q", "--checkpoint", "pixels", "--data", "digits", "--subset", "1img@1,2imgs@1,5imgs@1",
    "--probe", "logistic,knn,ncm,ridge", "--k", "10", "--device", "cpu", "--no-cache", "--out",
]  # fmt: skip
_READ = "import sys; from msn_eval.results.folder import list_results; list_results(sys.argv[1:])"


def main() -> None:
    """Print one line per command: minimum and median of its wall seconds and of its CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seed, runs, out = (Path(folder) / name for name in ("seed", "runs", "out"))
        evaluate = [*_EVALUATE, str(seed)]
        subprocess.run(evaluate, check=True, stdout=subprocess.DEVNULL)
        write_records(runs, chosen.checkpoints, seed=seed)
        report = [sys.executable, "-m", "msn_eval", "report", str(runs), "--out", str(out), "--format"]
        commands = {
            "torch": [sys.executable, "-c", "import torch"],
            "rerun": evaluate,
            "read": [sys.executable, "-c", _READ, str(runs)],
            "md": [*report, "md"],
            "html": [*report, "html"],
        }
        for name, command in commands.items():
            print(name, _timed(command, chosen.rounds), flush=True)
        print(f"page {(out / 'table.html').stat().st_size:,} bytes")


def write_records(runs: Path, checkpoints: int, *, seed: Path) -> None:
    """Write the records of `checkpoints` invented checkpoints, changed from those in `seed`."""
    records = [json.loads(path.read_text()) for path in sorted(seed.glob("*.json"))][:_PROTOCOLS]
    runs.mkdir()
    draw = random.Random(0)
    for number in range(checkpoints):
        weights = hashlib.sha256(str(number).encode()).hexdigest()
        for record in records:
            other = _changed(record, number, weights, draw)
            shutil.copy(seed / record["predictions"], runs / other["predictions"])
            (runs / f"{other['id']}.json").write_text(json.dumps(add_seal(other), indent=1) + "\n")


def _changed(record: dict[str, Any], number: int, weights: str, draw: random.Random) -> dict[str, Any]:
    key = record["checkpoint"]["key"]
    identity = result_id(
        weights_sha256=weights, key=key, protocol_id=record["protocol_id"], draw=record["split"]["draw"]
    )
    n = record["metrics"]["n"]
    right = draw.randrange(n // 10, n)
    seconds = {"extract": round(draw.random(), 4), "probe": round(draw.random(), 4), "total": round(draw.random(), 4)}
    return {
        **record,
        "id": identity,
        "predictions": f"{identity}.npz",
        "checkpoint": {
            **record["checkpoint"], "name": f"network-{number}", "path": f"/checkpoints/{number}.pth",
            "sha256": weights, "weights_sha256": weights,
        },
        "metrics": {**record["metrics"], "top1": right / n, "top5": 1.0, "top1_ci95": list(wilson_interval(right, n))},
        "timing_s": {**record["timing_s"], **seconds},
    }  # fmt: skip


def _timed(command: list[str], rounds: int) -> str:
    walls, busy = [], []
    for _ in range(rounds):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        walls.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    seconds = (f"{min(one):.2f} to {statistics.median(one):.2f} s" for one in (walls, busy))
    return "{} wall, {} CPU".format(*seconds)


if __name__ == "__main__":
    main()
