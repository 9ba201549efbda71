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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    weights="00" * 32,
    arch="vit_small_16_224",
    network=None,
    code=None,
    tap="cls",
    transform={"crop": 224},
    decoder="pillow 12.3",
    precision="fp32",
    device="cpu",
    compiled=False,
    torch="2.10.0",
    timm="1.0.20",
    extractor=1,
)
CONTENTS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(40)]
LISTS = [CONTENTS[start : start + 16] for start in (0, 8, 16, 24)]  # each shares half of its images with the next


@dataclass(frozen=True, kw_only=True)
class Account:
    """What one process counted."""

    reads: int = 0
    found: int = 0
    wrong: int = 0
    refused: int = 0
    warnings: int = 0


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory if possible; processes that wait for a disk collide less often."""
    cache_dir = Path("/dev/shm")
    if not cache_dir.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        yield Path(folder)


def rows_of(contents: Sequence[str]) -> Tensor:
    """Return features that identify each content."""
    return torch.tensor([list(bytes.fromhex(content)) for content in contents]).float()


def keep(features: FeatureFolder, contents: Sequence[str]) -> None:
    write_shard(features, contents, contents, rows_of(contents))


def read_and_write(folder: Path, reads: int, seed: int) -> Account:
    """Read many times, write sometimes, and count what is wrong."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    clock, skew = time.time, chance.choice((-3600, 0, 3600))
    time.time = lambda: clock() + skew  # no clock may matter
    os.fsync = lambda handle: None  # so that the processes collide more often; there is no power failure here
    warnings: list[logging.LogRecord] = []
    logger = logging.getLogger("msn_eval")
    logger.handlers[:] = [handler := logging.Handler()]
    handler.emit = warnings.append  # type: ignore[method-assign]
    found = wrong = refused = 0
    features = feature_cache.find_feature_folder(folder, KEY)
    for number in range(reads):
        try:
            if number % 8 == 0:
                keep(features, chance.choice(LISTS))
            wanted = chance.sample(CONTENTS, 4)
            values, there = read_rows(features, wanted)
        except StoreError:
            refused += 1
            continue
        for row in (row for row, one in enumerate(there) if one):
            assert values is not None
            found += 1
            wrong += not torch.equal(values[row], rows_of(wanted[row : row + 1])[0])
    return Account(reads=reads, found=found, wrong=wrong, refused=refused, warnings=len(warnings))


def prune(folder: Path, stop: float) -> Account:
    """Remove the folder repeatedly."""
    os.fsync = lambda handle: None
    features = feature_cache.find_feature_folder(folder, KEY)
    refused = 0
    while time.monotonic() < stop:
        try:
            remove_feature_folder(features)
        except StoreError:
            refused += 1
        time.sleep(0.002)
    return Account(refused=refused)


def run_together(tasks: Sequence[Callable[[], Account]]) -> Account:
    """Run each task in its own process, all at once, and add up their counts."""
    with _FORKED.Pool(len(tasks)) as pool:
        waiting = [pool.apply_async(task) for task in tasks]
        accounts = [one.get(timeout=60) for one in waiting]
    return Account(**{name: sum(getattr(one, name) for one in accounts) for name in vars(Account())})


def quarantined(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("features/*/quarantine/*")]


def is_clean(folder: Path, account: Account) -> bool:
    return (account.wrong, account.refused, account.warnings, quarantined(folder)) == (0, 0, 0, [])


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


BROKEN = [write_under_one_name, write_in_place]


@pytest.mark.parametrize(("processes", "reads"), [(2, 1200), (8, 1000)])
def test_processes_that_write_and_read_one_bank_read_nothing_wrong(cache: Path, processes: int, reads: int) -> None:
    """With 0 errors in 10,000 reads, fewer than 3 in 10,000 are wrong at 95 % confidence."""
    account = run_together([partial(read_and_write, cache, reads, seed) for seed in range(processes)])
    assert is_clean(cache, account), account
    assert account.found > account.reads * 3  # not all missing, which would also be right


@pytest.mark.parametrize("write", BROKEN)
def test_careless_writing_is_detected(
    cache: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    monkeypatch.setattr(feature_cache, "write_atomically", write)
    rounds = (run_together([partial(read_and_write, cache, 100, seed) for seed in range(8)]) for _ in range(20))
    assert any(not is_clean(cache, account) for account in rounds)


def test_rows_are_right_or_missing_during_pruning(cache: Path) -> None:
    workers = [partial(read_and_write, cache, 300, seed) for seed in range(6)]
    account = run_together([*workers, partial(prune, cache, time.monotonic() + 1.5)])
    assert account.wrong == 0, account
    assert 0 < account.found < account.reads * 4


def test_bank_is_complete_after_pruning(cache: Path) -> None:
    workers = [partial(read_and_write, cache, 100, seed) for seed in range(4)]
    run_together([*workers, partial(prune, cache, time.monotonic() + 0.5)])
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
    features = open_feature_folder(folder, KEY, checkpoint="vit.pth")
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
    assert damaged == 0
    assert valid > 40


def test_torn_writing_is_detected(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "write_atomically", write_in_place)
    assert any(shards_after_kills(cache, 20)[1] for _ in range(20))


def test_rows_are_right_after_kills(cache: Path) -> None:
    values, found = None, []
    while values is None:  # until a writer has lived long enough
        shards_after_kills(cache, 5)
        values, found = read_rows(open_feature_folder(cache, KEY, checkpoint="vit.pth"), CONTENTS)
    kept = [row for row, there in enumerate(found) if there]
    assert torch.equal(values[kept], rows_of([CONTENTS[row] for row in kept]))
