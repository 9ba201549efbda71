"""The README, kept true."""

import re
from pathlib import Path

import pytest

from msn_eval.cli import main
from msn_eval.commands import VERBS
from msn_eval.reports.text_tables import format_cell
from msn_eval.results.folder import list_results
from msn_eval.results.table import make_table

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def test_the_picture_shows_the_numbers_that_the_demo_prints(digits_runs: Path) -> None:
    table = make_table(list_results([digits_runs]))
    picture = (_ROOT / "docs" / "demo.svg").read_text(encoding="utf-8").replace("&#160;", " ")

    shown = [format_cell(cell) for (_, column), cell in table.cells.items() if column.probe in ("logistic", "knn")]

    assert [text for text in shown if text not in picture] == []


def test_every_option_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    verbs = [*VERBS, "subsets fetch", "subsets draw", "data verify"]
    for verb in verbs:
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))

    written = {
        option
        for line in _README.splitlines()
        if "ruff" not in line and "pip install" not in line
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)
    }

    assert written <= known


def test_the_two_commands_of_the_first_screen_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"^    make ([a-z]+)", _README, re.MULTILINE)) == {"demo", "test"} <= targets


def test_every_shipped_config_is_readable_and_opens_as_a_lab_note() -> None:
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.config.yaml_config import read_config

    for path in (_ROOT / "configs" / "eval").glob("*.yaml"):
        note = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        assert all(any(word in line for line in note) for word in ("Reproduces:", "Command:", "Expected:", "Time:"))
        assert isinstance(read_config(EvaluationConfig, file=path), EvaluationConfig)
