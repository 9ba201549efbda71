"""The README, kept true."""

import re
import tomllib
from pathlib import Path

from msn_eval.reports.text_tables import format_accuracy
from msn_eval.results.folder import list_results
from msn_eval.results.table import make_table

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def test_the_picture_shows_the_titles_and_numbers_that_the_demo_prints(digits_runs: Path) -> None:
    table = make_table(list_results([digits_runs]))
    picture = (_ROOT / "docs" / "demo.svg").read_text(encoding="utf-8").replace("&#160;", " ")

    cells = [format_accuracy(cell) for (_, column), cell in table.cells.items() if column.probe in ("logistic", "knn")]
    titles = [title for title, columns in table.groups().items() if columns[0].probe in ("logistic", "knn")]

    assert (len(titles), len(cells)) == (2, 5)
    texts = [text.strip() for text in re.findall(r">([^<>]+)</text>", picture)]
    assert [text for text in (*titles, *cells) if text not in texts] == []


def test_the_readme_has_the_numbers_that_the_demo_prints(digits_runs: Path) -> None:
    table = make_table(list_results([digits_runs]))

    shown = [format_accuracy(cell) for (_, column), cell in table.cells.items() if column.probe == "logistic"]

    assert len(shown) == 2
    assert [text for text in shown if text not in _README] == []


def test_the_readme_is_short_and_its_links_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", _README)

    assert len(_README.splitlines()) < 150
    assert [link for link in links if not (_ROOT / link).exists()] == []


def test_badges_say_what_the_package_states() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    badges = {path.stem: path.read_text(encoding="utf-8") for path in (_ROOT / "docs" / "badges").iterdir()}
    prefix = "Programming Language :: Python :: 3."
    minors = [text.removeprefix(prefix) for text in project["classifiers"] if text.startswith(prefix)]

    assert f"Python: {' | '.join(f'3.{minor}' for minor in minors)}" in badges["python"]
    assert f"licence: {project['license']}" in badges["licence"]
    assert any("Alpha" in text for text in project["classifiers"]) == ("status: alpha" in badges["status"])


def test_every_shipped_config_is_readable_and_opens_as_a_lab_note() -> None:
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.config.yaml_config import read_config

    for path in (_ROOT / "configs" / "eval").glob("*.yaml"):
        note = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        assert all(any(word in line for line in note) for word in ("Reproduces:", "Command:", "Expected:", "Time:"))
        assert isinstance(read_config(EvaluationConfig, file=path), EvaluationConfig)
