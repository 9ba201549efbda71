"""The functions of `import msn_eval`: single values, errors by argument, and results that show themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm.std import tqdm

import msn_eval
from msn_eval.api import Results
from msn_eval.errors import CheckpointError, UsageError
from msn_eval.features.extraction import Features
from msn_eval.results.folder import FIRST_COLUMNS, list_results

_DIGITS: dict[str, Any] = {"data": "digits", "device": "cpu", "no_cache": True}


@pytest.fixture
def results(digits_runs: Path) -> Results:
    return Results(list_results([digits_runs]))


def test_single_values_are_lists_of_one(tmp_path: Path) -> None:
    results = msn_eval.evaluate("pixels", subsets="1img@1", probes="ncm", out=tmp_path, **_DIGITS)

    assert [(result.probe.name, result.split.subset, result.split.draw) for result in results] == [("ncm", "1img", 1)]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"probes": []}, "probes: nothing given"),
        ({"subsets": "3imgz"}, "subsets 3imgz: no subset"),
        ({"image_pixels": -3}, "image_pixels -3: out of range"),
        ({"lambda_": "x"}, "lambda_ x: not a number"),
        ({"k": "x"}, "k: cannot be 'x'"),
        ({"mean": [2, 2, 2]}, "mean 2,2,2: out of range"),
        ({"save": "folder"}, "Use it with probes finetune."),
    ],
)
def test_wrong_argument_is_reported_by_its_name(wrong: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        msn_eval.evaluate("pixels", **_DIGITS | {"out": tmp_path} | wrong)

    assert text in str(caught.value)
    assert "--" not in str(caught.value)


def test_missing_checkpoint_is_reported_by_the_argument(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^no checkpoint given\nName one or several: checkpoints FILE"):
        msn_eval.evaluate([], out=tmp_path, **_DIGITS)


def test_wrong_argument_of_load_encoder_is_reported_by_its_name() -> None:
    with pytest.raises(UsageError, match=r"^device gpu is not a device"):
        msn_eval.load_encoder("pixels", device="gpu")


def test_file_name_that_looks_like_an_option_stays_as_it_is() -> None:
    with pytest.raises(CheckpointError, match=r"folder/--probe\.pth"):
        msn_eval.load_encoder("folder/--probe.pth", device="cpu")


def test_wrong_tap_of_extract_is_reported_by_its_name() -> None:
    encoder = msn_eval.load_encoder("pixels", device="cpu")

    with pytest.raises(UsageError, match=r"^tap cls: pixels"):
        msn_eval.extract(encoder, "digits", tap="cls")


def test_table_is_that_of_the_command(results: Results, digits_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from msn_eval.cli import main

    main(["report", str(digits_runs), "--no-ranks"])

    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert shown.startswith(results.table().rstrip())  # the command adds a note on ranks


def test_frame_starts_with_the_most_useful_columns(results: Results, digits_runs: Path) -> None:
    frame = results.frame()

    assert list(frame)[:12] == list(FIRST_COLUMNS)
    assert frame["metrics.top1"].tolist() == [result.metrics.top1 for result in results if result.metrics]
    assert frame.equals(msn_eval.read_results(digits_runs))


def test_frame_without_results_has_the_columns() -> None:
    assert list(Results().frame()) == list(FIRST_COLUMNS)


def test_plot_has_the_points_of_the_table(results: Results) -> None:
    from matplotlib.figure import Figure

    axes = Results(result for result in results if result.probe.name == "ncm").plot(Figure().add_subplot())

    (curve,) = axes.containers
    accuracies = {
        images: [
            r.metrics.top1 for r in results if r.metrics and r.probe.name == "ncm" and r.split.images == 10 * images
        ]
        for images in (1, 2)
    }
    line = curve.lines[0]  # type: ignore[attr-defined]
    assert line.get_xdata().tolist() == [1, 2]
    assert line.get_ydata().tolist() == pytest.approx([100 * sum(values) / 3 for values in accuracies.values()])
    assert axes.get_legend_handles_labels()[1] == ["pixels, ncm on digits"]


def test_plot_has_a_curve_of_its_own_for_a_test_set(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    results = msn_eval.evaluate("pixels", tests="digits", subsets="1img@1", probes="ncm", out=tmp_path, **_DIGITS)

    axes = results.plot(Figure().add_subplot())

    assert axes.get_legend_handles_labels()[1] == ["pixels, ncm on digits", "pixels, ncm on digits, scored on digits"]


def test_notebooks_show_tables_with_escaped_names(results: Results) -> None:
    from dataclasses import replace

    named = [replace(r, checkpoint=replace(r.checkpoint, name="<script>a</script>")) for r in results]

    page = Results(named)._repr_html_()

    assert page.count("<table") == 3  # logistic, knn and ncm
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


def test_features_are_shown_by_their_shape() -> None:
    features = Features(
        values=torch.zeros(3, 5), labels=torch.zeros(3).long(), image_ids=("a", "b", "c"), n_classes=2, tap="out"
    )

    assert repr(features) == "Features(shape=(3, 5), tap='out', images=3, classes=2)"


@pytest.mark.parametrize(("progress", "is_drawn"), [(None, False), (False, False), (True, True)])
def test_progress_is_drawn_where_asked_for(
    progress: bool | None, is_drawn: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    msn_eval.evaluate("pixels", subsets="1img@1", probes="ncm", out=tmp_path, progress=progress, **_DIGITS)

    captured = capsys.readouterr()
    assert ("pixels: validation images" in captured.err) == is_drawn
    assert captured.out == ""


def test_progress_is_drawn_by_itself_in_a_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # tqdm.auto makes a subclass of this kind where there is a kernel with widgets.
    notebook_bar = type("tqdm_notebook", (tqdm,), {"__module__": "tqdm.notebook"})
    monkeypatch.setattr("tqdm.auto.tqdm", notebook_bar)

    msn_eval.evaluate("pixels", subsets="1img@1", probes="ncm", out=tmp_path, **_DIGITS)

    assert "pixels: validation images" in capsys.readouterr().err
