"""`msn-eval report`: what is printed and written, and the errors."""

import json
import shutil
from pathlib import Path

import pytest

import msn_eval.reports.html.leaderboard
from msn_eval.cli import main

_RECORDS = Path(__file__).parents[2] / "golden" / "records" / "schema-1"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(_RECORDS, tmp_path / "runs"))


def test_every_format_is_written_under_its_own_suffix(runs: Path, tmp_path: Path) -> None:
    code = main(["report", str(runs), "--format", "md,csv,json,latex,html", "--out", str(tmp_path / "out")])

    names = {"table.md", "table.csv", "table.json", "table.tex", "table.html"}
    assert (code, {path.name for path in (tmp_path / "out").iterdir()}) == (0, names)


def test_a_folder_without_a_format_gets_every_format(runs: Path, tmp_path: Path) -> None:
    main(["report", str(runs), "--out", str(tmp_path / "out")])

    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".csv", ".json", ".tex", ".html"}


def test_a_page_can_be_printed_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs), "--format", "html"])

    printed = capsys.readouterr().out
    assert (printed.count("<!doctype html>"), printed.strip()[:15], printed.strip()[-7:]) == (
        1,
        "<!doctype html>",
        "</html>",
    )


@pytest.mark.parametrize(("imagenet", "rows"), [(True, True), (False, False)])
def test_published_rows_are_only_on_the_page_of_imagenet(
    imagenet: bool, rows: bool, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(msn_eval.reports.html.leaderboard, "is_imagenet", lambda result: imagenet)

    main(["report", str(runs), "--format", "html"])

    page = capsys.readouterr().out
    assert ('<tr class="pub">' in page, 'id="published"' in page, "checked><span>published" in page) == (
        rows,
        rows,
        False,
    )


def test_a_broken_record_is_named_and_the_table_says_that_it_is_left_out(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = runs / "9e8f2071fa9c582d.json"
    broken.write_text("{")

    code = main(["report", str(runs), "--format", "md"])

    shown = capsys.readouterr()
    assert code == 22
    assert str(broken) in shown.err
    assert "Left out: 1 record that cannot be read (9e8f2071fa9c582d.json)." in shown.out
    assert "| pixels | 62.0 (1) [55.1, 68.4] |" in shown.out  # the other one of two draws


def test_a_folder_of_broken_records_has_no_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in runs.glob("*.json"):
        path.write_text("")

    code = main(["report", str(runs)])

    shown = capsys.readouterr()
    assert (code, shown.out) == (22, "")
    assert "5 records cannot be used" in shown.err


def test_broken_predictions_are_named_and_end_with_22(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = runs / "9e8f2071fa9c582d.npz"
    broken.write_bytes(b"PK")

    code = main(["report", str(runs)])

    shown = capsys.readouterr()
    assert code == 22
    assert str(broken) in shown.err
    assert "69.0 ± 9.9 (2)" in shown.out


def test_published_rows_are_after_the_measured_ones(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs), "--format", "json"])
    without = json.loads(capsys.readouterr().out)
    main(["report", str(runs), "--format", "json", "--published"])
    beside = json.loads(capsys.readouterr().out)

    assert not any(row["source"] for row in without["rows"])
    assert beside["rows"][: len(without["rows"])] == without["rows"]
    assert all(row["source"] for row in beside["rows"][len(without["rows"]) :])


def test_an_unknown_format_names_the_nearest(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(runs), "--format", "latx"]) == 2
    assert "Did you mean latex?" in capsys.readouterr().err
