"""States of trainings: the newest undamaged one counts, and a disk that refuses costs no older one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from msn_eval.errors import StoreError
from msn_eval.probes import training_state
from msn_eval.probes.training_state import StateFiles, read_state, remove_states, write_state


@pytest.fixture
def files(tmp_path: Path) -> StateFiles:
    return StateFiles(out=tmp_path, facts={"draw": "1", "probe": "linear"})


def _write(files: StateFiles, *steps: int) -> None:
    for step in steps:
        write_state(files, {"weights": torch.full((3,), float(step))}, step=step)


def test_the_newest_state_is_read_and_two_are_kept(files: StateFiles) -> None:
    _write(files, 1, 2, 10)

    state = read_state(files)

    assert state is not None
    assert state["step"] == 10
    assert torch.equal(state["weights"], torch.full((3,), 10.0))
    assert len(files.find()) == 2


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:40] + b"X" + content[41:]])
def test_a_damaged_state_is_ignored_with_a_warning(
    damage: Callable[[bytes], bytes], files: StateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    _write(files, 1, 2)
    newest = files.find()[0]
    newest.write_bytes(damage(newest.read_bytes()))

    state = read_state(files)

    assert state is not None
    assert state["step"] == 1
    assert f"{newest} is damaged and ignored" in caplog.text


def test_a_training_with_different_facts_finds_nothing(files: StateFiles) -> None:
    _write(files, 1)

    assert read_state(StateFiles(out=files.out, facts={**files.facts, "draw": "2"})) is None


def test_a_disk_that_refuses_leaves_the_older_state_and_no_partial_file(
    files: StateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(files, 1)

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_state, "write_atomically", refuse)
    with pytest.raises(StoreError, match="could not keep the state of a training: No space left on device"):
        _write(files, 2)

    assert [path.name.split(".")[1] for path in files.folder.iterdir()] == ["step-00000001"]


def test_nothing_is_left_of_a_finished_training(files: StateFiles) -> None:
    _write(files, 1, 2)

    remove_states(files)

    assert list(files.out.iterdir()) == []
