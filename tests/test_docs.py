"""The Python code of the documentation runs."""

import re
from pathlib import Path

import pytest

_DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["python.md", "protocols/sklearn.md"])
def test_python_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (_DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, object] = {}

    for block in blocks:
        exec(compile(block, name, "exec"), names)

    assert blocks


def test_code_that_is_not_run_is_valid_python() -> None:
    text = (_DOCS / "python.md").read_text(encoding="utf-8")

    for block in re.findall(r"^```python no-run\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        compile(block, "python.md", "exec")
