import json
import random
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from torch import nn

from msn_eval.checkpoints.run_folder import newest_snapshot, snapshot_folder, snapshot_folders
from msn_eval.errors import NumericalError, StoreError
from msn_pretrain.training import snapshot as snapshots
from msn_pretrain.training.snapshot import (
    EvaluatedEncoder,
    Snapshot,
    equal,
    generator_states,
    read_snapshot,
    seed_generators,
    set_generators,
    write_snapshot,
)

_CPU = torch.device("cpu")
_ENCODER = EvaluatedEncoder(weights={"norm.weight": torch.ones(3)}, architecture="vit_tiny_patch16_224")


def _state(step: int) -> Snapshot:
    torch.manual_seed(step)
    layer = nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 40)).sum().backward()
    optimizer.step()
    return Snapshot(
        step=step,
        epoch=step // 4,
        model=layer.state_dict(),
        optimizer=optimizer.state_dict(),
        rng=(generator_states(_CPU),),
        watched={"bad_steps": 1, "collapsed_lines": 0},
    )


def _write(run: Path, step: int, *, keep_every: int = 0, snapshot: Snapshot | None = None) -> None:
    facts = {"epoch_end": step % 4 == 0}
    write_snapshot(run, snapshot or _state(step), _ENCODER, facts=facts, keep_every=keep_every)


def _steps(run: Path) -> list[int]:
    return [int(folder.name.partition("-")[2]) for folder in snapshot_folders(run)]


def test_snapshot_reads_back_equal(tmp_path: Path) -> None:
    written = _state(7)
    _write(tmp_path, 7, snapshot=written)

    files, skipped = newest_snapshot(tmp_path)

    assert files is not None
    assert skipped == ()
    restored = read_snapshot(files)
    for name in ("step", "epoch", "model", "optimizer", "rng", "watched"):
        assert equal(getattr(restored, name), getattr(written, name))


def test_restored_generators_continue(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    seed_generators(5)
    draw()
    states = generator_states(_CPU)
    expected = draw()

    seed_generators(6)
    set_generators(states, _CPU)

    assert draw() == expected


def test_two_generations_and_every_nth_epoch_are_kept(tmp_path: Path) -> None:
    for step in range(4, 33, 4):
        _write(tmp_path, step, keep_every=3)

    assert _steps(tmp_path) == [32, 28, 24, 12]


def _flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", None),
        ("manifest.json", lambda content: b"{"),
        ("state.pt", lambda content: content[:-100]),
        ("state.pt", _flip_bit),
        ("encoder.safetensors", _flip_bit),
    ],
)
def test_incomplete_snapshot_is_skipped_and_named(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    for step in (1, 2):
        _write(tmp_path, step)
    path = snapshot_folder(tmp_path, 2) / name
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))

    files, skipped = newest_snapshot(tmp_path)

    assert files is not None
    assert files.step == 1
    assert len(skipped) == 1
    assert skipped[0].startswith("step-00000002: ")


def test_state_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    bad = _state(2)
    weights = dict(bad.model) | {"weight": torch.full((30, 40), torch.nan)}

    with pytest.raises(NumericalError, match="weight"):
        _write(tmp_path, 2, snapshot=replace(bad, model=weights))

    assert _steps(tmp_path) == [1]


def test_full_disk_keeps_older_snapshots(tmp_path: Path) -> None:
    for step in (1, 2):
        _write(tmp_path, step)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    try:
        with pytest.raises(StoreError):
            _write(tmp_path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    files, _ = newest_snapshot(tmp_path)
    assert files is not None
    assert files.step == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_older_snapshots_stay_until_the_new_one_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        _write(tmp_path, step)
    save = torch.save

    def save_badly(state: dict[str, Any], file: BinaryIO) -> None:
        save({**state, "model": {name: value + 1 for name, value in state["model"].items()}}, file)

    monkeypatch.setattr(snapshots.torch, "save", save_badly)
    with pytest.raises(StoreError, match="read back"):
        _write(tmp_path, 3)

    files, _ = newest_snapshot(tmp_path)
    assert files is not None
    assert files.step == 2
    assert {1, 2} <= set(_steps(tmp_path))


def test_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = snapshots.write_atomically

    def listed(path: Path, content: bytes) -> None:
        if path.name == "manifest.json":
            assert set(json.loads(content)["files"]) <= {file.name for file in path.parent.iterdir()}
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(snapshots, "write_atomically", listed)
    _write(tmp_path, 1)

    assert written[-1] == "manifest.json"


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    for step in (1, 2):
        _write(tmp_path, step)

    one, other = (snapshot_folder(tmp_path, step) / "encoder.safetensors" for step in (1, 2))
    assert one.read_bytes() == other.read_bytes()
