"""`msn-eval report`: what is printed and written, and the errors."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import msn_eval.reports.html.leaderboard
from msn_eval.cli import main
from msn_eval.results.folder import read_results
from msn_eval.results.record import Result

RunWriter = Callable[..., list[Result]]
_RECORDS = Path(__file__).parents[2] / "golden" / "records" / "schema-1"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(_RECORDS, tmp_path / "runs"))


@pytest.mark.parametrize("formats", [(), ("--format", "md,csv,tidy,json,latex,html")], ids=["no format", "all formats"])
def test_every_format_is_written_under_its_own_suffix(formats: tuple[str, ...], runs: Path, tmp_path: Path) -> None:
    code = main(["report", str(runs), *formats, "--out", str(tmp_path / "out")])

    names = {"table.md", "table.csv", "table.json", "table.tex", "table.html", "table.tidy.csv"}
    assert (code, {path.name for path in (tmp_path / "out").iterdir()}) == (0, names)


@pytest.mark.parametrize("imagenet", [True, False])
def test_published_rows_are_only_on_the_page_of_imagenet(
    imagenet: bool, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(msn_eval.reports.html.leaderboard, "is_imagenet", lambda result: imagenet)

    main(["report", str(runs), "--format", "html"])

    page = capsys.readouterr().out
    assert page.startswith("<!doctype html>")
    assert ('<tr class="pub">' in page, 'id="published"' in page) == (imagenet, imagenet)
    assert "checked><span>published" not in page


def test_a_broken_record_is_named_and_the_table_says_that_it_is_left_out(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = runs / "9e8f2071fa9c582d.json"
    broken.write_text("{")

    code = main(["report", str(runs), "--format", "md"])

    shown = capsys.readouterr()
    assert code == 22
    assert str(broken) in shown.err
    assert "Not used: 1 record that cannot be read or is not as it was written (9e8f2071fa9c582d.json)." in shown.out
    assert "| pixels | 62.0 (1) [55.1, 68.4] |" in shown.out  # the other one of two draws


def test_a_folder_of_broken_records_has_no_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in runs.glob("*.json"):
        path.write_text("")

    code = main(["report", str(runs)])

    shown = capsys.readouterr()
    assert (code, shown.out) == (22, "")
    assert "5 records cannot be used" in shown.err


def test_broken_predictions_are_named_shown_as_damaged_and_end_with_22(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "9e8f2071fa9c582d.npz").write_bytes(b"PK")

    code = main(["report", str(runs)])

    shown = capsys.readouterr()
    assert code == 22
    assert str(runs / "9e8f2071fa9c582d.json: 9e8f2071fa9c582d.npz") in shown.err
    assert "69.0 ± 9.9 (2)" not in shown.out
    assert "DAMAGED: a record or its predictions are not as they were written; measure it again." in shown.out


@pytest.mark.parametrize("report_format", ["md", "csv", "json", "latex", "html"])
def test_edited_number_is_in_no_format(
    report_format: str, write_run: RunWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for draw in write_run(tmp_path, np.array([[True, False, True, True]] * 2)):
        path = tmp_path / f"{draw.id}.json"
    path.write_text(path.read_text().replace('"top1": 0.75', '"top1": 0.96875'))

    code = main(["report", str(tmp_path), "--format", report_format])

    shown = capsys.readouterr().out
    assert (code, "96.9" in shown, "0.96875" in shown) == (22, False, False)
    assert "damaged" in shown.lower()


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


def test_an_unknown_column_names_the_nearest(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["report", str(runs), "--columns", "eec"])

    assert code == 2
    assert "ece" in capsys.readouterr().err


def _read_report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["report", *arguments, "--format", "json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            [],
            {
                ("knn", "1img"),
                ("knn", "2imgs"),
                ("ncm", "1img"),
                ("ncm", "2imgs"),
                ("logistic", "1img"),
                ("logistic", "2imgs"),
            },
        ),
        (["--probe", "ncm"], {("ncm", "1img"), ("ncm", "2imgs")}),
        (["--probe", "ncm,knn", "--subset", "1img"], {("ncm", "1img"), ("knn", "1img")}),
    ],
)
def test_probe_and_subset_choose_the_columns(
    options: list[str], expected: set[tuple[str, str]], digits_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = _read_report(capsys, str(digits_runs), *options)["columns"]

    assert {(column["probe"], column["subset"]) for column in columns} == expected


@pytest.fixture
def two_networks(tmp_path: Path, write_run: RunWriter) -> Path:
    """Return a folder with the worse of two networks, `a/best`, and the better, `b/best`."""
    for folder, right in (("a", [True, False, False, True]), ("b", [True, True, True, True])):

        def move(result: Result, path: str = f"{folder}/best.pth") -> Result:
            return replace(result, checkpoint=replace(result.checkpoint, path=path))

        write_run(tmp_path / "runs", np.array([right] * 2), name="best", weights=folder * 64, changed=move)
    return tmp_path / "runs"


def test_checkpoint_chooses_rows_by_the_names_that_tables_show(
    two_networks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _read_report(capsys, str(two_networks), "--checkpoint", "b/best")["rows"]

    assert [row["weights_sha256"][0] for row in rows] == ["b"]


@pytest.mark.parametrize(("key", "names"), [("name", ["a/best", "b/best"]), ("knn,5imgs", ["b/best", "a/best"])])
def test_rows_are_sorted_by_name_or_by_the_columns_of_a_probe_and_a_subset(
    key: str, names: list[str], two_networks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = _read_report(capsys, str(two_networks), "--sort", key)["rows"]

    assert [row["name"] for row in rows] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probe", "nmc"], "--probe nmc: the folders hold no such result. Did you mean ncm?"),
        (["--subset", "5imgs"], "--subset 5imgs: the folders hold no such result."),
        (["--checkpoint", "pixel"], "--checkpoint pixel: the folders hold no such result. Did you mean pixels?"),
        (["--sort", "knn,2img"], "--sort knn,2img: no such column. Did you mean 2imgs?"),
        (["--sort", "knn,ncm"], "--sort knn,ncm: no column is of all of these.\nGive name, a probe"),
        (["--columns", "rankmee"], "--columns: cannot be 'rankmee'. Did you mean rankme?"),
    ],
)
def test_what_the_folders_do_not_hold_is_refused_with_what_they_hold(
    options: list[str], message: str, digits_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(digits_runs), *options]) == 2
    assert message in capsys.readouterr().err


def test_tidy_report_has_a_line_per_result_with_its_exact_numbers(
    digits_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(digits_runs), "--format", "tidy"]) == 0

    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    expected = read_results(digits_runs)
    assert {row["row"] for row in rows} == {"pixels"}
    assert [row["id"] for row in rows] == expected["id"].tolist()
    assert [float(row["metrics.top1"]) for row in rows] == expected["metrics.top1"].tolist()
    assert set(expected.columns) <= set(rows[0])
