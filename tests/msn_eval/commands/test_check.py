"""`msn-eval check` on the command line."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from msn_eval.cli import main
from msn_eval.results.record import Result

RunWriter = Callable[..., list[Result]]
_RIGHT = np.array([[True] * 3500 + [False] * 1500] * 2)


@pytest.fixture
def baseline(write_run: RunWriter, tmp_path: Path) -> list[str]:
    """Return the first arguments of a check against a baseline of 5,000 images."""
    write_run(tmp_path / "before", _RIGHT, name="old")
    assert main(["baseline", str(tmp_path / "before"), "--out", str(tmp_path / "b.json")]) == 0
    return ["check", "--baseline", str(tmp_path / "b.json")]


@pytest.fixture
def worse(write_run: RunWriter, tmp_path: Path) -> str:
    """Return a run that lost four points."""
    right = _RIGHT.copy()
    right[:, :200] = False
    write_run(tmp_path / "worse", right, name="new", weights="b" * 64)
    return str(tmp_path / "worse")


def test_equal_results_pass(baseline: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*baseline, str(tmp_path / "before")]) == 0
    assert "PASS: old [aaaaaaaa] against the baseline old" in capsys.readouterr().out


def test_drop_exits_with_10_and_states_its_size(
    baseline: list[str], worse: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*baseline, worse]) == 10

    out = capsys.readouterr().out
    assert "70.00 % -> 66.00 %: -4.00 points (95 % interval -4.5" in out
    assert "minimal detectable drop: 0." in out

    main([*baseline, worse, "--json"])

    report = json.loads(capsys.readouterr().out)
    assert (report["verdict"], report["exit_code"], report["margin"]) == ("regression", 10, 0.01)
    assert report["protocols"][0]["paired"]["lost"] == 200
    assert report["protocols"][0]["accuracy"] == 0.66


def test_junit_and_markdown_have_the_same_verdict(baseline: list[str], worse: str, tmp_path: Path) -> None:
    main([*baseline, worse, "--junit", str(tmp_path / "j.xml"), "--markdown", str(tmp_path / "m.md")])

    suite = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "1", "0")
    assert suite.find("testcase/failure[@type='regression']") is not None
    assert "| regression | 70.00 % | 66.00 % | -4.00 |" in (tmp_path / "m.md").read_text()


def test_missing_baseline_exits_with_12_and_is_written_to_the_files(
    write_run: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs", _RIGHT)
    files = ["--junit", str(tmp_path / "j.xml"), "--markdown", str(tmp_path / "m.md")]

    assert main(["check", "--baseline", str(tmp_path / "none.json"), str(tmp_path / "runs"), *files]) == 12

    assert "no baseline: there is no such file" in capsys.readouterr().err
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("errors") == "1"
    assert "not comparable" in (tmp_path / "m.md").read_text()


def test_unreadable_record_is_not_comparable(
    baseline: list[str], worse: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = next(Path(worse).glob("*.json"))
    record.write_text(record.read_text()[:100])

    assert main([*baseline, worse]) == 12
    assert record.name in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_damaged_result_is_not_comparable_and_named(
    baseline: list[str], tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = next((tmp_path / "before").glob("*.json"))
    path = record.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-40] + b" " * 40)

    assert main([*baseline, str(record.parent), "--junit", str(tmp_path / "j.xml")]) == 12
    assert path.name in capsys.readouterr().err
    assert path.name in (tmp_path / "j.xml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give result folders or --checkpoint, one of the two"),
        (["runs", "--checkpoint", "pixels"], "one of the two"),
        (["runs", "--data", "digits"], "--data needs --checkpoint"),
        (["runs", "--margin", "1"], "--margin 1: not a fraction"),
        (["runs", "--margin", "nan"], "--margin nan: not a fraction"),
        (["runs", "--margin", "-0.01"], "--margin -0.01: not a fraction"),
        (["runs", "--margin", "much"], "--margin: invalid float value: 'much'"),
        (["runs", "--junit", "/no/such/folder/j.xml"], "no file can be written there"),
        (["no/such/runs"], "no such result folder"),
        (["--checkpoint", "pixels", "--name", "x"], "--name needs result folders"),
        (["runs", "--limit", "5"], "unknown option --limit"),
    ],
)
def test_usage_errors(
    baseline: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*baseline, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["{runs}", "--margin", "2"], 2, "not a fraction"),
        (["{runs}", "--checkpoint", "pixels"], 2, "one of the two"),
        (["no/such/runs"], 2, "no such result folder"),
        (["--checkpoint", "gone.pth", "--data", "digits"], 20, "gone.pth"),
    ],
)
def test_files_of_an_earlier_pass_say_why_a_later_check_failed(
    baseline: list[str], tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    runs, junit, markdown = str(tmp_path / "before"), tmp_path / "j.xml", tmp_path / "m.md"
    files = ["--junit", str(junit), "--markdown", str(markdown)]
    assert main([*baseline, runs, *files]) == 0

    assert main([*baseline, *(one.format(runs=runs) for one in arguments), *files]) == code

    (case,) = ElementTree.parse(junit).getroot()
    assert text in case.find("error[@type='error']").get("message", "")  # type: ignore[union-attr]
    assert markdown.read_text().startswith("### msn-eval check: error")
    assert text in markdown.read_text().replace("\\", "")


_EXITS = {
    "import": "raise SystemExit(0)\n",
    "factory": "import sys\ndef make(): sys.exit(0)\n",
    "factory, os._exit": "import os\ndef make(): os._exit(0)\n",
    "forward": "def forward(self, images): raise SystemExit\n",
    "forward, os._exit": "def forward(self, images):\n        import os; os._exit(0)\n",
    "forward, an error": "def forward(self, images): return images @ images.new_zeros(5, 5)\n",
}


@pytest.mark.parametrize("where", _EXITS)
def test_checkpoint_whose_code_exits_is_refused(
    digits_baseline: Path,
    tmp_path: Path,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = _EXITS[where]
    if where.startswith("forward"):
        code = (
            f"import torch\nclass Net(torch.nn.Module):\n    image_pixels = 8\n    {code}\ndef make(): return Net()\n"
        )
    module = f"exits_{len(sys.modules)}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--checkpoint", f"py:{module}:make", "--device", "cpu", "--no-cache", "--out", str(tmp_path / "runs")]
    files = ["--junit", str(tmp_path / "j.xml"), "--markdown", str(tmp_path / "m.md")]

    assert main(["check", "--baseline", str(digits_baseline / "b.json"), *arguments, *files]) == 20

    reason = f"{'the module failed: RuntimeError' if 'error' in where else 'exits with'}"
    assert reason in capsys.readouterr().err
    assert reason in (tmp_path / "j.xml").read_text()
    assert f"py:{module}:make" in (tmp_path / "m.md").read_text().replace("\\", "")


def test_files_say_that_the_check_did_not_finish_while_it_runs(
    baseline: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def interrupt(path: Path) -> None:
        seen.append((tmp_path / "j.xml").read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr("msn_eval.results.baseline.read_baseline", interrupt)

    assert main([*baseline, str(tmp_path / "before"), "--junit", str(tmp_path / "j.xml")]) == 130

    assert "check did not finish" in seen[0]
    assert "check did not finish: it was stopped" in (tmp_path / "j.xml").read_text()


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_baseline_that_is_no_file_is_refused_at_once(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "b.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()

    assert main(["check", "--baseline", str(path), str(tmp_path)]) == 12
    reason = "Is a directory" if kind == "folder" else "it is a pipe, device or socket, not a regular file"
    assert f"{path}: no baseline: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--junit", "--markdown"])
def test_pipe_or_device_is_not_replaced_by_a_file(baseline: list[str], tmp_path: Path, option: str) -> None:
    os.mkfifo(tmp_path / "pipe")

    assert main([*baseline, str(tmp_path / "before"), option, str(tmp_path / "pipe")]) == 2
    assert (tmp_path / "pipe").is_fifo()


@pytest.fixture(scope="module")
def digits_baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a baseline of pixels on the digits: two probes, and not every combination of settings."""
    folder = tmp_path_factory.mktemp("digits")
    common = ["--checkpoint", "pixels", "--data", "digits", "--device", "cpu", "--out", str(folder / "runs")]
    cache = ["--cache", str(folder / "cache"), "-q"]
    assert main([*common, "--subset", "1img@1", "--probe", "ncm,knn", "--k", "1,3", *cache]) == 0
    assert main([*common, "--subset", "2imgs", "--probe", "ncm", *cache]) == 0
    assert main(["baseline", str(folder / "runs"), "--out", str(folder / "b.json")]) == 0
    return folder


def test_checkpoint_is_evaluated_by_the_protocols_of_the_baseline(
    digits_baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--out", str(tmp_path / "runs"), "--cache", str(digits_baseline / "cache"), "--device", "cpu"]
    capsys.readouterr()

    code = main(["check", "--baseline", str(digits_baseline / "b.json"), "--checkpoint", "pixels", "--json", *own])

    report = json.loads(capsys.readouterr().out)
    assert (code, report["verdict"]) == (0, "pass")
    assert [one["reason"] for one in report["protocols"]] == ["no prediction differs"] * 4
    assert len(list((tmp_path / "runs").glob("*.json"))) == 6


def test_other_data_set_is_refused_before_the_evaluation(
    digits_baseline: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(picture_folder / "val")
    own = ["--out", str(tmp_path / "runs"), "--no-cache", "--device", "cpu", "--data", str(data)]

    code = main(["check", "--baseline", str(digits_baseline / "b.json"), "--checkpoint", "pixels", *own])

    error = capsys.readouterr().err
    assert code == 12
    assert "ncm, 1img: this data set gives another protocol: " in error
    assert "data.sha256: " in error
    assert not (tmp_path / "runs").exists()
