"""Several processes that share one folder of features: what they read is right or missing, never wrong."""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msn_eval.errors import StoreError
from msn_eval.features import cache as feature_cache
from msn_eval.features.cache import (
    FeatureFolder,
    FeatureKey,
    open_feature_folder,
    read_rows,
    remove_feature_folder,
    verify_feature_folder,
    write_shard,
)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]
_FORKED = multiprocessing.get_context("fork") if hasattr(os, "fork") else multiprocessing.get_context()
KEY = FeatureKey(
    weights="00" * 32, arch="vit_small_16_224", network=None, code=None, tap="cls", transform={"crop": 224},
    decoder="pillow 12.3", precision="fp32", device="cpu", compiled=False, torch="2.10.0", timm="1.0.20", extractor=1,
)  # fmt: skip
CONTENTS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(40)]
LISTS = [CONTENTS[start : start + 16] for start in (0, 8, 16, 24)]  # each shares half of its images with the next


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory if possible; processes that wait for a disk collide less often."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def rows_of(contents: Sequence[str]) -> Tensor:
    """Return features that identify each content."""
    return torch.tensor([list(bytes.fromhex(content)) for content in contents]).float()


def keep(features: FeatureFolder, contents: Sequence[str]) -> None:
    write_shard(features, contents, contents, rows_of(contents))


def read_and_write(folder: Path, reads: int, seed: int) -> Counter[str]:
    """Read many times, write sometimes; count rows that are found and wrong, refused calls, and warnings."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    clock, skew = time.time, chance.choice((-3600, 0, 3600))
    time.time = lambda: clock() + skew  # no clock may matter
    os.fsync = lambda handle: None  # so that the processes collide more often; there is no power failure here
    counts: Counter[str] = Counter()
    logger = logging.getLogger("msn_eval")
    logger.handlers[:] = [handler := logging.Handler()]
    handler.emit = lambda record: counts.update(["warnings"])  # type: ignore[method-assign]
    features = feature_cache.find_feature_folder(folder, KEY)
    for number in range(reads):
        try:
            if number % 8 == 0:
                keep(features, chance.choice(LISTS))
            wanted = chance.sample(CONTENTS, 4)
            values, found = read_rows(features, wanted)
        except StoreError:
            counts["refused"] += 1
            continue
        for row in (row for row, is_found in enumerate(found) if is_found):
            assert values is not None
            counts["found"] += 1
            counts["wrong"] += not torch.equal(values[row], rows_of(wanted[row : row + 1])[0])
    return counts


def prune(folder: Path, stop: float) -> Counter[str]:
    """Remove the folder repeatedly."""
    os.fsync = lambda handle: None
    features = feature_cache.find_feature_folder(folder, KEY)
    while time.monotonic() < stop:
        with contextlib.suppress(StoreError):
            remove_feature_folder(features)
        time.sleep(0.002)
    return Counter()


def run_together(tasks: Sequence[Callable[[], Counter[str]]]) -> Counter[str]:
    """Run each task in its own process, all at once, and add up their counts."""
    with _FORKED.Pool(len(tasks)) as pool:
        results = [pool.apply_async(task) for task in tasks]
        return sum((result.get(timeout=60) for result in results), Counter())


def quarantined(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("features/*/quarantine/*")]


def is_clean(folder: Path, counts: Counter[str]) -> bool:
    return not any(counts[name] for name in ("wrong", "refused", "warnings")) and quarantined(folder) == []


def write_under_one_name(path: Path, content: bytes) -> None:
    """Write atomically, but with a temporary name that all processes share."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb", buffering=0) as file:
            file.write(content[:100])
            time.sleep(0.0005)
            file.write(content[100:])
        temporary.replace(path)
    except OSError as error:
        raise StoreError("could not write", where=str(path)) from error


def write_in_place(path: Path, content: bytes) -> None:
    """Write so that a reader or a kill may meet a partial file."""
    with path.open("wb", buffering=0) as file:
        file.write(content[:100])
        time.sleep(0.0005)
        file.write(content[100:])


@pytest.mark.parametrize(("processes", "reads"), [(2, 1200), (8, 1000)])
def test_processes_that_share_a_folder_read_nothing_wrong(cache: Path, processes: int, reads: int) -> None:
    """With 0 errors in 10,000 reads, fewer than 3 in 10,000 are wrong at 95 % confidence."""
    counts = run_together([partial(read_and_write, cache, reads, seed) for seed in range(processes)])
    assert is_clean(cache, counts), counts
    assert counts["found"] > processes * reads * 3  # not all missing, which would also be right


@pytest.mark.parametrize("write", [write_under_one_name, write_in_place])
def test_careless_writing_is_detected(
    cache: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    open_feature_folder(cache, KEY, checkpoint="vit.pth")
    monkeypatch.setattr(feature_cache, "write_atomically", write)
    rounds = (run_together([partial(read_and_write, cache, 100, seed) for seed in range(8)]) for _ in range(20))
    assert any(not is_clean(cache, counts) for counts in rounds)


def test_rows_are_right_or_missing_during_pruning_and_complete_afterwards(cache: Path) -> None:
    workers = [partial(read_and_write, cache, 300, seed) for seed in range(6)]
    counts = run_together([*workers, partial(prune, cache, time.monotonic() + 1.5)])
    assert counts["wrong"] == 0, counts
    assert 0 < counts["found"] < len(workers) * 300 * 4

    features = open_feature_folder(cache, KEY, checkpoint="vit.pth")
    for contents in LISTS:
        keep(features, contents)
    values, found = read_rows(features, CONTENTS)
    assert values is not None
    assert (all(found), torch.equal(values, rows_of(CONTENTS)), verify_feature_folder(features)) == (True, True, (4, 0))


# Kills.


def write_forever(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    chance = random.Random(seed)
    features = feature_cache.find_feature_folder(folder, KEY)
    while True:
        keep(features, chance.choice(LISTS))


@contextlib.contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """Yield the id of a process that does the work; kill it after the block."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def shards_after_kills(folder: Path, kills: int) -> tuple[int, int]:
    """Kill a writer at random moments; count the valid and the damaged shards after each kill."""
    chance = random.Random(5)
    features = feature_cache.find_feature_folder(folder, KEY)
    all_valid = all_damaged = 0
    for seed in range(kills):
        with forked(partial(write_forever, folder, seed)):
            time.sleep(chance.uniform(0.005, 0.03))
        valid, damaged = verify_feature_folder(features)
        all_valid += valid
        all_damaged += damaged
        if seed % 3 == 0:
            remove_feature_folder(features)  # so that names are new as often as not
    return all_valid, all_damaged


def test_manifest_left_by_a_killed_writer_has_a_complete_shard(cache: Path) -> None:
    valid, damaged = shards_after_kills(cache, 40)
    while valid <= 40:  # writers that share the cores with others finish fewer shards before they are killed
        more = shards_after_kills(cache, 40)
        valid, damaged = valid + more[0], damaged + more[1]
    assert damaged == 0


def test_torn_writing_is_detected(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "write_atomically", write_in_place)
    assert any(shards_after_kills(cache, 20)[1] for _ in range(20))


def test_rows_are_right_after_kills(cache: Path) -> None:
    values, found = None, []
    while values is None:  # until a writer has lived long enough
        shards_after_kills(cache, 5)
        values, found = read_rows(open_feature_folder(cache, KEY, checkpoint="vit.pth"), CONTENTS)
    kept = [row for row, is_found in enumerate(found) if is_found]
    assert torch.equal(values[kept], rows_of([CONTENTS[row] for row in kept]))
