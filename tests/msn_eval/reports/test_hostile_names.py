"""A sample of the names that tests/exact tries by the thousand; its checks can fail."""

from types import FunctionType, ModuleType

import pytest

from msn_eval.errors import one_line
from msn_eval.reports import csv_table, latex, markdown, terminal
from msn_eval.reports.csv_table import escape_csv
from msn_eval.reports.latex import escape_latex
from msn_eval.reports.text_tables import markdown_text


@pytest.fixture
def hostile_names(hostile_pages: ModuleType) -> ModuleType:
    module: ModuleType = hostile_pages.hostile_names
    return module


def test_known_attacks_and_generated_names_change_no_report_format(hostile_names: ModuleType) -> None:
    for attack in hostile_names.ATTACKS:
        hostile_names.check_name(attack)
    hostile_names.check_names(40)


@pytest.mark.parametrize(
    ("module", "escape", "name"),
    [
        (terminal, one_line, "\x1b[31mred"),
        (terminal, one_line, "two\nlines"),
        (markdown, markdown_text, "a|b"),
        (markdown, markdown_text, "[x](y)"),
        (markdown, markdown_text, "<b>"),
        (csv_table, escape_csv, "=1+1"),
        (latex, escape_latex, "\\input{x}"),
        (latex, escape_latex, "50% of it"),
        (latex, escape_latex, "a&b"),
        (latex, escape_latex, "中"),
    ],
)
def test_a_report_format_without_escaping_fails_the_check(
    hostile_names: ModuleType, monkeypatch: pytest.MonkeyPatch, module: ModuleType, escape: FunctionType, name: str
) -> None:
    monkeypatch.setattr(module, escape.__name__, lambda text: text)

    with pytest.raises(AssertionError):
        hostile_names.check_name(name)
