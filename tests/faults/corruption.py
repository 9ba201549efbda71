"""Damage a random file of a result folder or a cache, and compare every number that is shown afterwards with the true one.

    python tests/faults/corruption.py --count 1000 [--seed 0]

Each seed damages one file in one way: a flipped bit, a cut end, two values in each other's place, a zeroed page, a lost line,
or shuffled rows. Afterwards each command must show the numbers of the undamaged files, or say DAMAGED or end with another code
than 0; the same evaluation must measure what was damaged again, so that `verify` has no fault to find.
"""

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from msn_eval import evaluate, read_results
from msn_eval.cli import main as run_command
from msn_eval.errors import MsnEvalError
from msn_eval.results.record import Result

_VALUE = re.compile(rb'(?<=[ :\[,])(?:-?\d[\d.e+-]*|"[^"]*")')
_PAGE = 512
Numbers = dict[str, object]
Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Undamaged files.

    Attributes:
        root: Has `data`, `runs` and `cache`.
        numbers: Metrics of each result, by id.
        table: The report of `runs`.
        comparison: The comparison of `runs` with itself.
    """

    root: Path
    numbers: Numbers
    table: str
    comparison: str


def make_scene(root: Path) -> Scene:
    """Evaluate a few small images, with every index and hash cached."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(3):
            folder = root / "data" / split / f"class-{label}"
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = 0.5 * generator.integers(0, 256, (16, 16, 3)) + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    with small_caches():
        results = _evaluate(root, root / "runs", root / "cache")
    runs = str(root / "runs")
    _, table, _ = _run("report", runs, "--format", "json")
    _, comparison, _ = _run("compare", runs, runs, "--json")
    return Scene(root=root, numbers=_collect(results), table=table, comparison=comparison)


@contextlib.contextmanager
def small_caches() -> Iterator[None]:
    """Cache hashes and listings of few and new files too."""
    with (
        mock.patch("msn_eval.data.hashing._SETTLED_NS", 0),
        mock.patch("msn_eval.data.index._SETTLED_NS", 0),
        mock.patch("msn_eval.data.index._FEWEST_IMAGES", 0),
    ):
        yield


def damage_and_check(scene: Scene, seed: int, folder: Path) -> tuple[str, list[str]]:
    """Damage one file of a copy of the scene in `folder`.

    Returns:
        What was damaged and how, and every wrong number that was shown without a word.
    """
    chance = random.Random(seed)
    runs, cache = (Path(shutil.copytree(scene.root / name, folder / name)) for name in ("runs", "cache"))
    target = chance.choice(
        ["runs/*.json", "runs/*.npz", "cache/hashes/*", "cache/indexes/*", "cache/features/*/[0-9a-f]*"]
    )
    path = chance.choice(sorted(folder.glob(target)))
    content = path.read_bytes()
    while True:
        name, damage = chance.choice(list(_DAMAGES.items()))
        if (damaged := damage(content, chance)) != content:
            break
    path.write_bytes(damaged)
    check = _check_results if target.startswith("runs") else _check_cache
    with small_caches():
        return f"{target}: {name}", check(scene, runs, cache)


def _check_results(scene: Scene, runs: Path, cache: Path) -> list[str]:
    faults = []
    code, table, _ = _run("report", str(runs), "--format", "json")
    if code == 0 and table != scene.table:
        faults.append("report ends with 0 and another table")
    shown = [cell["mean"] for row in json.loads(table or '{"rows": []}')["rows"] for cell in row["cells"].values()]
    true = [cell["mean"] for row in json.loads(scene.table)["rows"] for cell in row["cells"].values()]
    if set(shown) - {None} - set(true):
        faults.append("report shows a number that nobody measured")
    code, comparison, _ = _run("compare", str(runs), str(scene.root / "runs"), "--json")
    if code == 0 and comparison != scene.comparison:
        faults.append("compare ends with 0 and another result")
    with contextlib.suppress(MsnEvalError):
        frame = read_results(runs)
        if dict(zip(frame["id"], frame["metrics.top1"], strict=True)) != {
            identity: metrics["top1"]
            for identity, metrics in scene.numbers.items()  # type: ignore[index]
        }:
            faults.append("read_results returns other numbers")
    try:
        if _collect(_evaluate(scene.root, runs, cache)) != scene.numbers:
            faults.append("the same evaluation returns other numbers")
        code, _, said = _run("verify", str(runs))
        if code != 0:
            faults.append(f"verify ends with {code} after the same evaluation: {said}")
    except MsnEvalError as error:
        faults.append(f"the same evaluation is refused: {error}")
    return faults


def _check_cache(scene: Scene, runs: Path, cache: Path) -> list[str]:
    try:
        return [
            f"the {time} evaluation with this cache returns other numbers"
            for time in ("first", "second")
            if _collect(_evaluate(scene.root, runs.with_name(time), cache)) != scene.numbers
        ]
    except MsnEvalError as error:
        return [f"an evaluation with this cache is refused: {error}"]


def _evaluate(root: Path, out: Path, cache: Path) -> list[Result]:
    subsets, probes = ["1img@1", "2imgs@1"], ["ncm"]
    return evaluate(
        ["pixels"],
        data=str(root / "data"),
        subsets=subsets,
        probes=probes,
        out=out,
        cache=cache,
        device="cpu",
        workers=0,
    )


def _collect(results: list[Result]) -> Numbers:
    return {result.id: None if result.metrics is None else vars(result.metrics) for result in results}


def _run(*arguments: str) -> tuple[int, str, str]:
    """Return the exit code of a command, its output and its messages."""
    out, messages = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
        code = run_command([*arguments, "-q"])
    return code, out.getvalue(), messages.getvalue()


def _flip_bit(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def _swap_values(content: bytes, chance: random.Random) -> bytes:
    """Swap two numbers or texts of a text file, or two words of eight bytes."""
    places = [match.span() for match in _VALUE.finditer(content)]
    if b"\0" in content or len(places) < 2:
        places = [(start, start + 8) for start in range(0, len(content) - 7, 8)]
    (a, b), (c, d) = sorted(chance.sample(places, 2))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _zero_page(content: bytes, chance: random.Random) -> bytes:
    start = _PAGE * chance.randrange(-(-len(content) // _PAGE))
    length = min(_PAGE, len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def _lose_line(content: bytes, chance: random.Random) -> bytes:
    lines = content.split(b"\n")
    if len(lines) < 3 or b"\0" in content:  # binary, or on one line
        lines = [content[start : start + 16] for start in range(0, len(content), 16)]
        return b"".join(line for number, line in enumerate(lines) if number != len(lines) // 2)
    del lines[chance.randrange(len(lines))]
    return b"\n".join(lines)


def _shuffle_rows(content: bytes, chance: random.Random) -> bytes:
    """Shuffle one array of an archive of arrays, the lines of a text, or pieces of 64 bytes."""
    if content.startswith(b"PK"):
        with np.load(io.BytesIO(content)) as stored:
            arrays = dict(stored)
        name = chance.choice(sorted(arrays))
        arrays[name] = arrays[name][chance.sample(range(len(arrays[name])), len(arrays[name]))]
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        return packed.getvalue()
    separator = b"\n" if content.count(b"\n") > 2 and b"\0" not in content else b""
    rows = content.split(b"\n") if separator else [content[start : start + 64] for start in range(0, len(content), 64)]
    chance.shuffle(rows)
    return separator.join(rows)


_DAMAGES: dict[str, Damage] = {
    "flipped bit": _flip_bit,
    "cut": _cut,
    "swapped values": _swap_values,
    "zeroed page": _zero_page,
    "lost line": _lose_line,
    "shuffled rows": _shuffle_rows,
}


def main() -> None:
    """Print the number of damages of each kind, and end with 1 if one of them changed a number without a word."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    kinds: Counter[str] = Counter()
    silent = 0
    with tempfile.TemporaryDirectory() as root:
        scene = make_scene(Path(root))
        for seed in range(chosen.seed, chosen.seed + chosen.count):
            with tempfile.TemporaryDirectory() as folder:
                kind, faults = damage_and_check(scene, seed, Path(folder))
            kinds[kind] += 1
            silent += bool(faults)
            for fault in faults:
                print(f"seed {seed}, {kind}: {fault}", flush=True)
    for kind, count in sorted(kinds.items()):
        print(f"{count:5}  {kind}")
    print(f"{chosen.count} damages, {silent} silent")
    raise SystemExit(1 if silent else 0)


if __name__ == "__main__":
    main()
