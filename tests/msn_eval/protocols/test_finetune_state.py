"""States of a fine-tuning: whole or not there, the newest that can be trusted, and none of another run's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msn_eval.errors import NumericalError, StoreError
from msn_eval.protocols.finetune_state import FinetuneState, StateFiles, read_state, remove_states, write_state


@pytest.fixture
def files(tmp_path: Path) -> StateFiles:
    return StateFiles(out=tmp_path, id="ab" * 8, facts={"labelled images": "these"})


def _state(step: int, value: float = 1.0) -> FinetuneState:
    weights = torch.full((3,), value)
    return FinetuneState(
        step=step, network={"head": weights}, optimizer={"state": {0: {"step": torch.tensor(1.0)}}}, loss=(0.5, 2)
    )


def test_newest_state_is_read(files: StateFiles) -> None:
    for step in (2, 10, 9):
        write_state(files, _state(step))

    found = read_state(files)

    assert found is not None
    assert (found.step, found.loss) == (10, (0.5, 2))


def test_nothing_is_read_where_nothing_was_written(files: StateFiles) -> None:
    assert read_state(files) is None


def test_the_newest_two_are_kept(files: StateFiles) -> None:
    for step in range(1, 6):
        write_state(files, _state(step))

    assert [path.name.split(".")[1] for path in files.found()] == ["step-00000005", "step-00000004"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_damaged_state_is_passed_over_for_the_one_before(
    files: StateFiles, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_state(files, _state(1))
    newest = write_state(files, _state(2))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[damage])

    found = read_state(files)

    assert found is not None
    assert found.step == 1
    assert f"{newest} is passed over" in caplog.text


def test_state_of_other_labelled_images_is_passed_over(files: StateFiles, caplog: pytest.LogCaptureFixture) -> None:
    write_state(files, _state(1))

    assert read_state(replace(files, facts={"labelled images": "others"})) is None
    assert "it is of another labelled images" in caplog.text


def test_state_of_another_result_is_not_looked_at(files: StateFiles) -> None:
    write_state(files, _state(1))

    assert read_state(replace(files, id="cd" * 8)) is None


def test_weights_that_are_not_finite_are_not_written(files: StateFiles) -> None:
    write_state(files, _state(1))

    with pytest.raises(NumericalError, match=r"1 weights are not finite after step 2 \(head\)"):
        write_state(files, _state(2, float("nan")))

    assert len(files.found()) == 1


def test_folder_that_cannot_be_written_is_named_and_older_states_stay(files: StateFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = replace(files, out=tmp_path / "file")

    with pytest.raises(StoreError, match="could not write a state"):
        write_state(blocked, _state(1))


def test_states_that_became_a_result_are_removed_with_their_folder(files: StateFiles) -> None:
    write_state(files, _state(1))

    remove_states(files)

    assert not files.folder.exists()


def test_states_of_other_results_stay(files: StateFiles) -> None:
    other = replace(files, id="cd" * 8)
    write_state(files, _state(1))
    write_state(other, _state(1))

    remove_states(files)

    assert len(other.found()) == 1
