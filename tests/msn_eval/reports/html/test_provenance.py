import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval import evaluate
from msn_eval.cli import main
from msn_eval.reports.html.provenance import format_command, pack_records
from msn_eval.results.folder import list_results
from msn_eval.results.record import Result


@pytest.fixture
def results(digits_runs: Path) -> list[Result]:
    return list_results([digits_runs])


@pytest.mark.parametrize("probe", ["logistic", "knn", "ncm"])
def test_command_reproduces_the_record(probe: str, results: list[Result], tmp_path: Path) -> None:
    record = next(result for result in results if result.probe.name == probe and result.split.draw == 2)
    arguments = shlex.split(format_command(record))

    code = main([*arguments[1:], "--device", "cpu", "--no-cache", "--out", str(tmp_path), "-q"])

    (again,) = list_results([tmp_path])
    assert (code, again.id, again.metrics) == (0, record.id, record.metrics)


@pytest.mark.parametrize(
    "recipe",
    [
        {"lr": 3.0, "epochs": 4},
        {"lrs": 2, "weight_decays": 1, "epochs": 2, "seed": 1},
        {"taps": ["pixels"], "lr": 3.0, "epochs": 1},
    ],
)
def test_command_reproduces_the_linear_probe(recipe: dict[str, object], tmp_path: Path) -> None:
    options = {"subsets": ["2imgs@1"], "probes": ["linear"], "device": "cpu", "no_cache": True}
    (record,) = evaluate(["pixels"], data="digits", out=tmp_path / "first", linear=recipe, **options)
    arguments = shlex.split(format_command(record))

    code = main([*arguments[1:], "--device", "cpu", "--no-cache", "--out", str(tmp_path / "again"), "-q"])

    (again,) = list_results([tmp_path / "again"])
    assert (code, again.id, again.metrics, again.probe) == (0, record.id, record.metrics, record.probe)


def test_command_has_every_option_that_was_set_manually(results: list[Result]) -> None:
    record = results[0]
    by_hand = {"tap": "mean", "image_pixels": 96, "decoder": "torchvision"}
    protocol = {**record.protocol, "by_hand": by_hand, "limit": 3, "skipped": "f" * 64}
    checkpoint = replace(record.checkpoint, key="teacher", allow_missing=("head.*",))
    changed = replace(record, checkpoint=checkpoint)
    object.__setattr__(changed, "protocol", protocol)  # its id does not matter here

    command = format_command(changed)

    for option in (
        *("--checkpoint-key teacher", "--allow-missing 'head.*'", "--tap mean", "--image-pixels 96"),
        *("--decoder torchvision", "--limit 3", "--on-bad-image skip"),
    ):
        assert option in command


def test_names_are_quoted_for_the_shell(results: list[Result]) -> None:
    checkpoint = replace(results[0].checkpoint, path="a b; rm -rf $HOME")

    assert "--checkpoint 'a b; rm -rf $HOME' " in format_command(replace(results[0], checkpoint=checkpoint))


def test_a_list_file_has_no_draw(results: list[Result]) -> None:
    record = replace(results[0], split=replace(results[0].split, subset="mine.txt", draw=1))
    object.__setattr__(record, "protocol", {**record.protocol, "subset": {"name": "mine.txt", "rule": "list:abc"}})

    assert format_command(record).endswith("--subset mine.txt")


def test_an_accuracy_that_is_not_a_count_of_images_keeps_all_digits(results: list[Result]) -> None:
    metrics = results[0].metrics
    assert metrics is not None
    odd = replace(results[0], metrics=replace(metrics, top1=0.1234567890123))

    (record,) = pack_records([odd])["records"]

    assert [0.1234567890123] in record
    assert list(metrics.top1_ci95) == record[-2:]  # which cannot be computed from it
