import json
from pathlib import Path

import pytest

from msn_pretrain.training.journal import METRICS, cut, open_journal, read_metrics


def _lines(run: Path) -> list[int]:
    return [json.loads(text)["step"] for text in (run / METRICS).read_text().splitlines()]


def test_a_journal_that_goes_on_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=True, step=0, steps=9) as journal:
        for step in (1, 2, 3, 4):
            journal.write({"step": step, "loss": 0.5})

    with open_journal(tmp_path, first=True, step=2, steps=9) as journal:
        journal.write({"step": 3, "loss": 0.25})

    assert _lines(tmp_path) == [1, 2, 3]
    assert read_metrics(tmp_path / METRICS)[-1]["loss"] == 0.25


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')

    cut(tmp_path / METRICS, step=5)

    assert _lines(tmp_path) == [1]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=True, step=0, steps=1) as journal:
        journal.write({"step": 1, "loss": float("nan"), "rank": float("inf")})

    assert (tmp_path / METRICS).read_text() == '{"step": 1, "loss": null, "rank": null}\n'


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=False, step=0, steps=1) as journal:
        journal.write({"step": 1})
        journal.sync()

    assert list(tmp_path.iterdir()) == []


def test_what_is_written_stands_in_tensorboard_too(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_journal(tmp_path, first=True, step=0, steps=2) as journal:
        journal.write({"step": 1, "loss": 0.5})
        journal.write({"step": 2, "loss": 0.25})

    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")

    assert [(event.step, event.value) for event in events] == [(1, 0.5), (2, 0.25)]


def test_a_full_disk_is_told_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        open_journal(tmp_path, first=True, step=0, steps=3) as journal,
    ):
        real, journal.file = journal.file, full
        for step in (1, 2):
            journal.write({"step": step})
        journal.file = real

    assert caplog.text.count("No space left") == 1
