"""`msn-eval card` on the command line, read back by huggingface_hub."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from msn_eval.cli import main
from msn_eval.results.folder import list_results
from msn_eval.results.record import Result
from msn_eval.results.table import make_table

RunWriter = Callable[..., list[Result]]
_RIGHT = np.array([[True] * 3500 + [False] * 1500] * 2)


@pytest.fixture
def card(digits_runs: Path, tmp_path: Path) -> ModelCard:
    """Return the card of the digits, as huggingface_hub reads it."""
    assert main(["card", str(digits_runs), "--checkpoint", "pixels", "--out", str(tmp_path / "README.md")]) == 0
    return ModelCard.load(tmp_path / "README.md")


def test_metadata_are_the_numbers_of_the_table(card: ModelCard, digits_runs: Path) -> None:
    table = make_table(list_results([digits_runs]))

    entries = card.data.eval_results

    assert card.data.model_name == "pixels"
    assert {entry.metric_args["protocol_id"]: entry.metric_value for entry in entries} == {
        column.protocol_id: cell.mean for (_, column), cell in table.cells.items()
    }
    assert {(entry.dataset_name, entry.dataset_config, entry.metric_args["draws"]) for entry in entries} == {
        ("digits", "1img", 3),
        ("digits", "2imgs", 3),
    }


def test_each_number_of_the_text_has_its_protocol_id(card: ModelCard, digits_runs: Path) -> None:
    rows = {line.split("|")[-2].strip(): line for line in card.text.splitlines() if line.count("|") == 6}

    for (_, column), cell in make_table(list_results([digits_runs])).cells.items():
        assert cell.mean is not None
        assert f"| {100 * cell.mean:.1f} ± " in rows[column.protocol_id]


def test_text_names_each_data_set_once_and_explains_what_cells_have(card: ModelCard) -> None:
    (row,) = [line for line in card.text.splitlines() if "logistic" in line and "1img" in line]

    assert row.startswith("| logistic on digits | 1img, 1 image per class, λ=0.0025 | 62.9 ± 5.1 | 3 | ")
    assert "\nTop-1 accuracy in percent: mean ± sample standard deviation over draws.\n" in card.text


def test_hostile_name_ends_neither_metadata_nor_table(write_run: RunWriter, tmp_path: Path) -> None:
    name = "a\n---\nlicense: x | <b>*y*: 'z'"
    write_run(tmp_path / "runs", _RIGHT, name=name)

    assert main(["card", str(tmp_path / "runs"), "--out", str(tmp_path / "card.md")]) == 0

    card = ModelCard.load(tmp_path / "card.md")
    assert card.data.model_name == "a --- license: x | <b>*y*: 'z'"
    assert card.data.license is None
    assert [entry.metric_value for entry in card.data.eval_results] == [0.7]
    assert "# a --- license: x \\| \\<b\\>\\*y\\*: 'z'" in card.text


def test_damaged_record_is_refused_and_nothing_is_written(
    write_run: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = write_run(tmp_path / "runs", _RIGHT)[0]
    path = tmp_path / "runs" / f"{result.id}.json"
    content = json.loads(path.read_text())
    content["metrics"]["top1"] = 0.99
    path.write_text(json.dumps(content))

    assert main(["card", str(tmp_path / "runs"), "--out", str(tmp_path / "card.md")]) == 22

    assert path.name in capsys.readouterr().err
    assert not (tmp_path / "card.md").exists()


def test_one_of_several_checkpoints_must_be_named(
    write_run: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs", _RIGHT, name="one")
    write_run(tmp_path / "runs", _RIGHT, name="two", weights="b" * 64)
    command = ["card", str(tmp_path / "runs"), "--out", str(tmp_path / "card.md")]

    assert main(command) == 2
    assert "one" in capsys.readouterr().err
    assert main([*command, "--checkpoint", "two"]) == 0
    assert ModelCard.load(tmp_path / "card.md").data.model_name == "two"


def test_own_card_is_replaced_and_another_file_is_not(
    write_run: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs", _RIGHT)
    command = ["card", str(tmp_path / "runs"), "--out", str(tmp_path / "card.md")]

    assert (main(command), main(command)) == (0, 0)
    (tmp_path / "card.md").write_text("# By hand\n")
    assert main(command) == 2

    assert (tmp_path / "card.md").read_text() == "# By hand\n"
    assert "a file that is not by this command" in capsys.readouterr().err
