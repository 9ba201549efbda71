"""The doctor: what it finds decides its exit code, and each problem has a hint."""

from pathlib import Path

import pytest

from msn_eval.cli import main
from msn_eval.commands import doctor


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MSN_EVAL_DATA", raising=False)
    monkeypatch.setattr(doctor, "_FEW_BYTES", 1)


def examine(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = main(["doctor", "--cache", "cache", *arguments])
    return code, capsys.readouterr().out.splitlines()


def test_working_machine_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = examine(capsys, "--data", "digits")
    assert (code, [line for line in lines if line.startswith("PROBLEM")]) == (0, [])
    assert any(line.split()[:2] == ["ok", "cpu"] and "a matrix product is right" in line for line in lines)
    assert "ok      data                digits: 1,000 train, 797 val, 10 classes" in lines


def test_data_set_of_the_variable_that_is_missing_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSN_EVAL_DATA", "nowhere")
    code, lines = examine(capsys)
    problem = lines.index("PROBLEM data                nowhere: the data folder does not exist")
    assert (code, lines[problem + 1].strip().startswith("Give a folder")) == (30, True)


def test_cache_that_is_a_file_is_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    Path("cache").touch()
    code, lines = examine(capsys)
    assert (code, [line for line in lines if line.startswith("PROBLEM")]) == (
        30,
        ["PROBLEM cache               cache: is the name of a file, not of a folder"],
    )


@pytest.mark.parametrize(
    ("limit", "name", "hint"),
    [("_FEW_BYTES", "memory", "Free memory."), ("_FEW_DESCRIPTORS", "open files", "ulimit -n 1024")],
)
def test_short_resource_is_a_problem_with_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, limit: str, name: str, hint: str
) -> None:
    monkeypatch.setattr(doctor, limit, 1 << 60)
    code, lines = examine(capsys)
    problem = next(number for number, line in enumerate(lines) if line.startswith(f"PROBLEM {name}"))
    assert (code, hint in lines[problem + 1]) == (30, True)


def test_missing_extra_is_named_with_its_command_and_is_no_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "slurm", ("no_such_package",))
    code, lines = examine(capsys)
    assert code == 0
    assert (
        '-       extra slurm         no_such_package not installed; if you need it: pip install "msn-eval[slurm]"'
        in lines
    )
