import json
from pathlib import Path

import pytest

from msn_pretrain.training import journal as journal_module
from msn_pretrain.training.journal import (
    METRICS,
    AlarmCounters,
    find_alarm,
    open_journal,
    read_metrics,
    truncate_metrics,
)


def _lines(run: Path) -> list[int]:
    return [json.loads(text)["step"] for text in (run / METRICS).read_text().splitlines()]


def test_resumed_journal_drops_steps_that_run_again(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=True, step=0, steps=9) as journal:
        for step in (1, 2, 3, 4):
            journal.write({"step": step, "loss": 0.5})

    with open_journal(tmp_path, first=True, step=2, steps=9) as journal:
        journal.write({"step": 3, "loss": 0.25})

    assert _lines(tmp_path) == [1, 2, 3]
    assert read_metrics(tmp_path / METRICS)[-1]["loss"] == 0.25


def test_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')

    truncate_metrics(tmp_path / METRICS, step=5)

    assert _lines(tmp_path) == [1]


def test_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with open_journal(tmp_path, first=True, step=0, steps=1) as journal:
        journal.write({"step": 1, "loss": float("nan"), "rank": float("inf")})

    assert (tmp_path / METRICS).read_text() == '{"step": 1, "loss": null, "rank": null}\n'


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


def test_full_disk_is_logged_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        open_journal(tmp_path, first=True, step=0, steps=3) as journal,
    ):
        real, journal.file = journal.file, full
        for step in (1, 2):
            journal.write({"step": step})
        journal.file = real

    assert caplog.text.count("No space left") == 1


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
