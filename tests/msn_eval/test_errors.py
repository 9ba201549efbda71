import inspect
import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_eval import errors
from msn_eval.errors import (
    CheckpointError,
    ComparisonError,
    DataError,
    MsnEvalError,
    NumericalError,
    ResourceError,
    StoreError,
    UsageError,
    did_you_mean,
    printable,
)

# https://www.unicode.org/Public/UCD/latest/ucd/PropList.txt, Bidi_Control
DIRECTION_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (MsnEvalError, 1),
        (UsageError, 2),
        (CheckpointError, 20),
        (DataError, 21),
        (StoreError, 22),
        (NumericalError, 23),
        (ResourceError, 30),
        (ComparisonError, 12),
    ],
)
def test_each_kind_of_error_has_its_exit_code(kind: type[MsnEvalError], code: int) -> None:
    assert kind("what").exit_code == code


def test_every_kind_of_error_stands_in_the_tree_with_its_exit_code() -> None:
    kinds = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, MsnEvalError)]
    tree = {words[-2]: int(words[-1]) for line in (errors.__doc__ or "").splitlines() if (words := _entry(line))}
    assert tree == {kind.__name__: kind.exit_code for kind in kinds}


def _entry(line: str) -> list[str]:
    """Give the name and the code of a line of the tree, else nothing."""
    words = [word for word in line.split()[:3] if word not in ("├──", "└──")][:2]
    return words if len(words) == 2 and words[1].isdecimal() else []


def test_text_says_where_what_the_remedy_and_what_was_kept() -> None:
    error = DataError("is empty", where="data/val", hint="Fill it.", kept="Results are kept.")
    assert str(error) == "data/val: is empty\nFill it.\nResults are kept."


def test_text_without_place_or_remedy_is_what_was_wrong() -> None:
    assert str(UsageError("nothing given")) == "nothing given"


def test_error_survives_the_way_from_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(DataError("is empty", where="val", hint="Fill it.", kept="All.")))
    assert (type(error), str(error)) == (DataError, "val: is empty\nFill it.\nAll.")


def test_text_of_an_error_is_made_printable() -> None:
    text = str(DataError("\x1b[1mbold\x1b[0m", where="caf\udce9"))
    assert text == "caf\\udce9: \\x1b[1mbold\\x1b[0m"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m", id="ANSI colours"),
        pytest.param("\x9b31mred", "\\x9b31mred", id="C1"),
        pytest.param("a\x00\x07\x08\rb\x7f", "a\\x00\\x07\\x08\\x0db\\x7f", id="C0"),
        pytest.param("\u202egpj.exe", "\\x202egpj.exe", id="right to left"),
        pytest.param("caf\udce9", "caf\\udce9", id="undecodable byte"),
    ],
)
def test_what_a_terminal_would_act_upon_is_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("mark", DIRECTION_MARKS, ids=lambda mark: f"U+{ord(mark):04X}")
def test_marks_that_turn_the_direction_of_text_are_spelled_out(mark: str) -> None:
    assert mark not in printable(f"a{mark}b")


@pytest.mark.parametrize("text", ["two\nlines\tand a tab", "naïve café", "猫 🐈", "שלום", "a\\b", ""])
def test_plain_text_of_any_language_is_left_alone(text: str) -> None:
    assert printable(text) == text


@settings(database=None, derandomize=True, max_examples=200)
@given(st.text(st.characters(), max_size=20))
def test_no_text_whatever_controls_the_terminal(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert [one for one in shown if unicodedata.category(one) == "Cc" and one not in "\n\t"] == []


@pytest.mark.parametrize(
    ("name", "hint"), [("logstic", " Did you mean logistic?"), ("KNN", ""), ("", ""), ("something else", "")]
)
def test_nearest_name_is_offered_where_one_is_near(name: str, hint: str) -> None:
    assert did_you_mean(name, ["logistic", "knn", "ncm"]) == hint
