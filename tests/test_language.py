"""The language of code, documentation and reports: docstrings say what is returned or done, and some words are never used."""

import ast
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".js", ".css", ".txt"}
_FOLDERS = (
    "msn_eval",
    "msn_pretrain",
    "tests",
    "benchmarks",
    "configs",
    "docs",
    "reports",
    "examples",
    "imagenet_subsets",
)
_BANNED = re.compile(
    r"\b(wherein|foretell|foretold|heed|heeds|heeded|thereof|whence|amiss|lest|all but|no accident)\b", re.IGNORECASE
)


def _files() -> list[Path]:
    inside = [path for folder in _FOLDERS for path in (_ROOT / folder).rglob("*") if path.suffix in _SUFFIXES]
    return sorted(path for path in [*inside, *_ROOT.glob("*.md"), _ROOT / "pyproject.toml"] if path != Path(__file__))


def _docstrings(path: Path) -> list[tuple[int, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
    return [(getattr(node, "lineno", 1), ast.get_docstring(node) or "") for node in nodes]


def test_no_docstring_starts_with_give_tell_or_say() -> None:
    found = [
        f"{path.relative_to(_ROOT)}:{line}"
        for path in _files()
        if path.suffix == ".py"
        for line, text in _docstrings(path)
        if re.match(r"(Give|Tell|Say)\b", text)
    ]

    assert found == []


def test_banned_words_appear_nowhere() -> None:
    found = [
        f"{path.relative_to(_ROOT)}:{number}: {line.strip()}"
        for path in _files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if _BANNED.search(line)
    ]

    assert found == []


@pytest.mark.parametrize("sentence", ["Whether the two differ, and WHEREIN.", "It is all but done.", "Heed the alarm."])
def test_banned_words_are_found(sentence: str) -> None:
    assert _BANNED.search(sentence)
