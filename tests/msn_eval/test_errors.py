import difflib
import inspect
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_eval import errors
from msn_eval.errors import DataError, MsnEvalError, UsageError, did_you_mean, list_first, printable, suggest_paths

# https://www.unicode.org/Public/UCD/latest/ucd/PropList.txt, Bidi_Control
DIRECTION_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_every_class_is_in_the_tree_of_the_module_with_its_exit_code() -> None:
    classes = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, MsnEvalError)]
    tree = {entry[0]: int(entry[1]) for line in (errors.__doc__ or "").splitlines() if (entry := _entry(line))}
    assert tree == {cls.__name__: cls.exit_code for cls in classes}
    assert sorted(tree.values()) == [1, 2, 12, 20, 21, 22, 22, 23, 30, 31]


def _entry(line: str) -> list[str]:
    """Return the name and the code of a line of the tree, else nothing."""
    fields = [field for field in line.split()[:4] if field not in ("│", "├──", "└──")][:2]
    return fields if len(fields) == 2 and fields[1].isdecimal() else []


def test_text_has_place_cause_hint_and_what_was_kept() -> None:
    error = DataError("is empty", where="data/val", hint="Fill it.", kept="Results are kept.")
    assert str(error) == "data/val: is empty\nFill it.\nResults are kept."


def test_a_line_end_in_a_place_does_not_break_the_line() -> None:
    assert str(DataError("is empty", where="data/a\nb")) == "data/a\\nb: is empty"


def test_text_without_place_and_hint_is_the_cause() -> None:
    assert str(UsageError("nothing given")) == "nothing given"


def test_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(DataError("is empty", where="val", hint="Fill it.", kept="All.")))
    assert (type(error), str(error)) == (DataError, "val: is empty\nFill it.\nAll.")


@pytest.mark.parametrize(
    ("most", "separator", "text"),
    [(4, ", ", "a, b, c"), (3, ", ", "a, b, c"), (2, ", ", "a, b and 1 more"), (1, "\n  ", "a\n  and 2 more")],
)
def test_first_texts_are_followed_by_the_number_of_the_others(most: int, separator: str, text: str) -> None:
    assert list_first(["a", "b", "c"], most, separator) == text


def test_text_of_an_error_is_printable() -> None:
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
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("mark", DIRECTION_MARKS, ids=lambda mark: f"U+{ord(mark):04X}")
def test_direction_marks_are_escaped(mark: str) -> None:
    assert mark not in printable(f"a{mark}b")


@pytest.mark.parametrize("text", ["two\nlines\tand a tab", "naïve café", "猫 🐈", "שלום", "a\\b", ""])
def test_plain_text_of_any_language_is_unchanged(text: str) -> None:
    assert printable(text) == text


@settings(database=None, derandomize=True, max_examples=200)
@given(st.text(st.characters(), max_size=20))
def test_no_text_contains_control_characters(text: str) -> None:
    shown = printable(text)
    shown.encode("utf-8")
    assert [char for char in shown if unicodedata.category(char) == "Cc" and char not in "\n\t"] == []


@pytest.mark.parametrize(
    ("name", "hint"), [("logstic", " Did you mean logistic?"), ("KNN", ""), ("", ""), ("something else", "")]
)
def test_nearest_known_name_is_suggested(name: str, hint: str) -> None:
    assert did_you_mean(name, ["logistic", "knn", "ncm"]) == hint


@pytest.mark.parametrize("typo", ["n00000007/ILSVRC2012_val_0000351.JPEG", "n0000007/ILSVRC2012_val_00000351.JPEG"])
def test_a_few_of_many_names_are_compared_in_full(typo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"n{label:08d}/ILSVRC2012_val_{50 * label + image:08d}.JPEG" for label in range(40) for image in range(50)]
    compared = []

    class Matcher(difflib.SequenceMatcher[str]):
        def ratio(self) -> float:
            compared.append(self.a)
            return super().ratio()

    monkeypatch.setattr(difflib, "SequenceMatcher", Matcher)

    assert did_you_mean(typo, names) == " Did you mean n00000007/ILSVRC2012_val_00000351.JPEG?"
    assert len(compared) <= 500


def test_options_are_not_alike_for_their_dashes() -> None:
    assert did_you_mean("--columns", ["--slurm"]) == ""


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("runs/bets.pth", " Did you mean runs/best.pth?"),
        ("rnus/best.pth", " Did you mean runs/best.pth?"),
        ("rnus/none.pth", ""),
        ("other", ""),
        ("runs/" + "x" * 300, ""),
        ("", ""),
    ],
)
def test_suggested_path_exists(name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "best.pth").touch()
    monkeypatch.chdir(tmp_path)

    assert suggest_paths(name) == hint
