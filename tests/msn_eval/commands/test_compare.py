"""`msn-eval compare` on the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msn_eval.cli import main
from msn_eval.results.record import Result

RunWriter = Callable[..., list[Result]]
_RIGHT = np.array([[True] * 60 + [False] * 40] * 2)


@pytest.fixture
def runs(write_run: RunWriter, tmp_path: Path) -> Path:
    """Return two folders with one checkpoint each, `a` and `b`, and one with both."""
    for folder in ("a", "both"):
        write_run(tmp_path / folder, _RIGHT, name="old")
    for folder in ("b", "both"):
        write_run(tmp_path / folder, np.roll(_RIGHT, 30), name="new", weights="b" * 64)
    return tmp_path


def test_two_folders_and_two_names_print_the_same(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "a"), str(runs / "b")]) == 0
    by_folder = capsys.readouterr().out
    assert main(["compare", "--runs", str(runs / "both"), "old", "bbbbbbbb"]) == 0

    assert capsys.readouterr().out == by_folder
    assert "first   old [aaaaaaaa]\nsecond  new [bbbbbbbb]" in by_folder


def test_json_has_every_flipped_image(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", str(runs / "a"), str(runs / "b"), "--json"])

    (one,) = json.loads(capsys.readouterr().out)["protocols"]
    assert len(one["flips"]) == one["paired"]["differing"] == 60
    assert one["flips"][0] == {"image": "ant/00000.png", "first": 2, "second": 0}


def test_markdown_has_a_row_per_protocol(runs: Path) -> None:
    main(["compare", str(runs / "a"), str(runs / "b"), "--markdown", str(runs / "c.md")])

    rows = [line for line in (runs / "c.md").read_text().splitlines() if line.startswith("| knn")]
    assert len(rows) == 1
    assert "| right on the same images |" not in rows[0]


@pytest.mark.parametrize("damage", ["flipped bit", "missing", "edited record"])
def test_damage_of_one_protocol_ends_with_22_and_is_named(
    runs: Path, write_run: RunWriter, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, weights in (("a", "a"), ("b", "b")):  # a second protocol, which alone is enough to compare
        second = write_run(runs / folder, _RIGHT, k=2, weights=weights * 64, name="two")[0]
    record = runs / "b" / f"{second.id}.json"
    damage_record(record, damage)

    code = main(["compare", str(runs / "a"), str(runs / "b")])

    shown = capsys.readouterr()
    assert (code, shown.out) == (22, "")
    assert f"{second.id}.npz" in shown.err or str(record) in shown.err


def damage_record(record: Path, damage: str) -> None:
    predictions = record.with_suffix(".npz")
    if damage == "missing":
        predictions.unlink()
    elif damage == "flipped bit":
        predictions.write_bytes(predictions.read_bytes()[:-1] + b"\x01")
    else:
        record.write_text(record.read_text().replace('"draw": 1', '"draw": 2'))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "nowhere"], 2, "no such result folder"),
        (["a", "both"], 2, "holds results of 2 checkpoints, and one is needed: "),
        (["--runs", "both", "old", "newer"], 2, "Did you mean new?"),
        (["a"], 2, "the following arguments are required"),
        (["a", "b", "--markdown", "nowhere/c.md"], 2, "no file can be written there"),
    ],
)
def test_usage_errors(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(runs)

    assert main(["compare", *arguments]) == code
    assert message in capsys.readouterr().err
