"""`msn-eval baseline` on the command line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from msn_eval.cli import main
from msn_eval.results.baseline import read_baseline
from msn_eval.results.record import Result

RunWriter = Callable[..., list[Result]]
_RIGHT = np.array([[True] * 60 + [False] * 40] * 2)


def test_baseline_prints_its_content_and_hash(
    write_run: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs", _RIGHT)

    assert main(["baseline", str(tmp_path / "runs"), "--out", str(tmp_path / "b.json")]) == 0

    out = capsys.readouterr().out
    assert "knn k=1 T=0.07, 5imgs: 60.00 % of 100 images, 2 draws" in out
    assert read_baseline(tmp_path / "b.json").sha256 in out


def test_one_of_several_checkpoints_must_be_named(
    write_run: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs", _RIGHT, name="old")
    write_run(tmp_path / "runs", ~_RIGHT, name="new", weights="b" * 64)
    command = ["baseline", str(tmp_path / "runs"), "--out", str(tmp_path / "b.json")]

    assert main(command) == 2
    assert "one is needed" in capsys.readouterr().err
    assert main([*command, "--name", "new"]) == 0
    assert read_baseline(tmp_path / "b.json").checkpoint["name"] == "new"


def test_partial_results_leave_no_file(
    write_run: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs", _RIGHT, limit=5)

    assert main(["baseline", str(tmp_path / "runs"), "--out", str(tmp_path / "b.json")]) == 12
    assert "--limit 5" in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()


def test_folder_is_refused_as_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["baseline", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no file can be written there" in capsys.readouterr().err
