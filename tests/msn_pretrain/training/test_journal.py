import itertools
import json
import time
from pathlib import Path
from typing import Protocol

import pytest

from msn_eval.errors import StoreError
from msn_pretrain.training import journal as journal_module
from msn_pretrain.training.journal import (
    METRICS,
    AlarmCounters,
    Journal,
    find_alarm,
    open_journal,
    read_metrics,
    truncate_metrics,
)


class SmallDisk(Protocol):
    """A file system of its own, as the fixture mounts it."""

    folder: Path

    def resize(self, size: str) -> None: ...


def _lines(run: Path) -> list[int]:
    return [json.loads(text)["step"] for text in (run / METRICS).read_text().splitlines()]


def test_resumed_journal_drops_steps_that_run_again(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=True, step=0, steps=9) as journal:
        for step in (1, 2, 3, 4):
            journal.write({"step": step, "loss": 0.5})

    with open_journal(tmp_path, first=True, step=2, steps=9) as journal:
        journal.write({"step": 3, "loss": 0.25})

    assert _lines(tmp_path) == [1, 2, 3]
    assert read_metrics(tmp_path / METRICS)[0][-1]["loss"] == 0.25


def test_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')

    truncate_metrics(tmp_path / METRICS, step=5)

    assert _lines(tmp_path) == [1]


def test_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=True, step=0, steps=1) as journal:
        journal.write({"step": 1, "loss": float("nan"), "rank": float("inf")})

    assert read_metrics(tmp_path / METRICS)[0] == [{"step": 1, "loss": None, "rank": None}]


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=False, step=0, steps=1) as journal:
        journal.write({"step": 1})
        journal.sync()

    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_same_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    with open_journal(tmp_path, first=True, step=0, steps=2) as journal:
        journal.write({"step": 1, "loss": 0.5})
        journal.write({"step": 2, "loss": 0.25})

    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")

    assert [(event.step, event.value) for event in events] == [(1, 0.5), (2, 0.25)]


def test_without_tensorboard_only_metrics_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "find_spec", lambda name: None)
    caplog.set_level("INFO", logger="msn_pretrain")

    with open_journal(tmp_path, first=True, step=0, steps=1) as journal:
        journal.write({"step": 1, "loss": 0.5})
        journal.sync()

    assert [path.name for path in tmp_path.iterdir()] == [METRICS]
    assert "pip install 'msn-eval[tensorboard]'" in caplog.text


def test_resuming_reports_damaged_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_journal(tmp_path, first=True, step=0, steps=9) as journal:
        for step in (1, 2, 3):
            journal.write({"step": step, "loss": 0.5})
    content = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(content.replace(b"0.5", b"0.7", 1))

    truncate_metrics(tmp_path / METRICS, step=5)

    assert "metrics.jsonl: 1 damaged line left out (1)" in caplog.text
    assert _lines(tmp_path) == [2, 3]


def test_resuming_adds_checksums_to_a_journal_without(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 0.5}\n')

    truncate_metrics(tmp_path / METRICS, step=5)

    assert '"crc"' in (tmp_path / METRICS).read_text()


def test_lines_that_a_full_disk_refused_are_written_when_there_is_space(
    small_disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    with open_journal(small_disk.folder, first=True, step=0, steps=601) as journal:
        for step in range(1, 601):
            journal.write({"step": step, "loss": 0.5, "filler": 1 / 3})
        with pytest.raises(StoreError, match="No space left"):
            journal.sync()
        small_disk.resize("1m")
        journal.write({"step": 601, "loss": 0.25})
        journal.sync()

    assert caplog.text.count("metrics.jsonl and tensorboard cannot be written: No space left on device") == 1
    assert _lines(small_disk.folder) == list(range(1, 602))
    events = (
        event_accumulator.EventAccumulator(str(small_disk.folder / "tensorboard"), {"scalars": 0})
        .Reload()
        .Scalars("loss")
    )
    assert [event.step for event in events] == list(range(1, 602))


def test_a_disk_that_stays_full_ends_nothing(small_disk: SmallDisk, caplog: pytest.LogCaptureFixture) -> None:
    with open_journal(small_disk.folder, first=True, step=0, steps=601) as journal:
        for step in range(1, 601):
            journal.write({"step": step, "loss": 0.5})

    assert "the last lines of" in caplog.text


@pytest.mark.parametrize(
    ("counters", "message"),
    [
        (AlarmCounters(bad_steps=2, collapsed_lines=9), ""),
        (AlarmCounters(bad_steps=3), "3 steps in a row"),
        (AlarmCounters(collapsed_lines=10), "has collapsed"),
    ],
)
def test_three_bad_steps_or_ten_collapsed_lines_raise_the_alarm(counters: AlarmCounters, message: str) -> None:
    alarm = find_alarm(counters)

    assert (alarm is not None) == bool(message)
    if alarm:
        assert alarm.exit_code == 23
        assert message in str(alarm)


def _show_steps(journal: Journal, steps: int) -> None:
    for step in range(1, steps + 1):
        if journal.is_due(step):
            journal.show_progress(step, 100.0, loss=1.5, memory_bytes=2**30)


def test_without_a_terminal_there_is_a_line_per_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="msn_pretrain")

    with open_journal(tmp_path, first=True, step=0, steps=9, epoch_steps=3) as journal:
        _show_steps(journal, 9)

    lines = [message for message in caplog.messages if message.startswith("epoch")]
    assert [line.partition(":")[0] for line in lines] == [
        f"epoch {epoch} of 3, step {3 * epoch} of 9" for epoch in (1, 2, 3)
    ]
    assert "loss 1.5000  100 images/s  1.00 GiB" in lines[0]
    assert lines[-1].endswith("the last step")


def test_long_epochs_have_a_line_per_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="msn_pretrain")
    clock = itertools.count(time.monotonic(), step=10.0)
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: next(clock))  # ten seconds between two looks

    with open_journal(tmp_path, first=True, step=0, steps=100, epoch_steps=100) as journal:
        _show_steps(journal, 40)

    steps = [int(message.split()[5]) for message in caplog.messages if message.startswith("epoch 1 of 1")]
    assert len(steps) > 3
    assert {second - first for first, second in itertools.pairwise(steps)} == {6}


def test_quiet_run_shows_no_progress(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=True, step=0, steps=1, quiet=True) as journal:
        assert not journal.is_due(1)
