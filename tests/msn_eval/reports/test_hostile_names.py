"""A sample of the names that tests/exact tries by the thousand, and that its checks can fail."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def exact() -> ModuleType:
    path = Path(__file__).parents[2] / "exact" / "hostile_names.py"
    spec = importlib.util.spec_from_file_location("hostile_names", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_form_of_a_report_is_changed_by_known_attacks(exact: ModuleType) -> None:
    for attack in exact.ATTACKS:
        exact.check_name(attack)


def test_no_form_of_a_report_is_changed_by_made_up_names(exact: ModuleType) -> None:
    exact.check_names(100)


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        ("terminal", "one_line", "\x1b[31mred"),
        ("terminal", "one_line", "two\nlines"),
        ("text_tables", "markdown_text", "a|b"),
        ("text_tables", "markdown_text", "[x](y)"),
        ("text_tables", "markdown_text", "<b>"),
        ("text_tables", "_text", "=1+1"),
        ("latex", "_escaped", "\\input{x}"),
        ("latex", "_escaped", "50% of it"),
        ("latex", "_escaped", "a&b"),
        ("latex", "_escaped", "中"),
    ],
)
def test_a_form_that_forgot_to_escape_would_be_found(
    exact: ModuleType, monkeypatch: pytest.MonkeyPatch, module: str, function: str, name: str
) -> None:
    monkeypatch.setattr(f"msn_eval.reports.{module}.{function}", lambda text: text)

    with pytest.raises(AssertionError):
        exact.check_name(name)
