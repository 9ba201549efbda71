"""Random labels: results at chance pass, a leak is refused, and no record is written."""

import shutil
from dataclasses import replace
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msn_eval import evaluate
from msn_eval.cli import main
from msn_eval.config.request import EvaluationConfig
from msn_eval.errors import NumericalError
from msn_eval.evaluation import measurement
from msn_eval.evaluation.canary import FALSE_ALARMS, choose_labels, judge_canary, refuse_leaks
from msn_eval.features.extraction import Features
from msn_eval.results.folder import list_results
from msn_eval.results.record import Result
from msn_eval.results.statistics import compute_metrics

_CLASSES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image folder of four classes of coloured noise, four train and thirty val images each."""
    root = tmp_path_factory.mktemp("canary") / "clean"
    generator = np.random.default_rng(0)
    for label, name in enumerate(_CLASSES):
        for split, count in (("train", 4), ("val", 30)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 200, (9, 9, 3), dtype=np.uint8) + np.uint8(13 * label)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def leaking(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same folder with the validation images among the labelled ones."""
    root = tmp_path_factory.mktemp("canary") / "leaking"
    shutil.copytree(clean, root)
    shutil.rmtree(root / "train")
    shutil.copytree(root / "val", root / "train")
    return root


def _command(data: Path, out: Path) -> list[str]:
    arguments = (
        "--canary --checkpoint pixels --subset full --probe logistic,knn,ridge,ncm --k 1 --device cpu --no-cache"
    )
    return [*arguments.split(), "--data", str(data), "--out", str(out)]


def test_run_without_a_leak_is_at_chance_and_writes_nothing(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(_command(clean, tmp_path / "runs"))

    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert len(lines) == 4
    assert all(line.startswith("canary     pixels: ") and "of 120 right, 30.0 by chance" in line for line in lines)
    assert not (tmp_path / "runs").exists()


def test_validation_images_among_the_labelled_ones_are_found(
    leaking: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(_command(leaking, tmp_path / "runs"))

    output = capsys.readouterr()
    assert code == 23
    assert "--canary: something leaks: with random labels" in output.err
    assert "knn k=1 temperature=0.07 full@1: 120 of 120 right" in output.out
    assert "LEAKS" in output.out
    assert not (tmp_path / "runs").exists()


def test_scoring_that_sees_the_labels_is_found(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "rank_labels", lambda scores, labels: (labels, torch.ones_like(labels)))

    with pytest.raises(NumericalError, match="something leaks"):
        evaluate(["pixels"], data=str(clean), subsets=["1img"], out=tmp_path, device="cpu", no_cache=True, canary=True)


def test_a_canary_is_its_own_protocol_and_is_never_written(clean: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": str(clean),
        "subsets": "1img@1",
        "out": tmp_path,
        "device": "cpu",
        "no_cache": True,
    }
    (real,) = evaluate(["pixels"], **options)

    (canary,) = evaluate(["pixels"], **options, canary=True)

    assert (canary.protocol["by_hand"], real.protocol["by_hand"]) == ({"canary": 0}, {})
    assert canary.protocol_id != real.protocol_id
    assert [result.id for result in list_results([tmp_path])] == [real.id]


def _features(split: str, n: int) -> Features:
    ids = tuple(f"{split}{row}" for row in range(n))
    return Features(values=torch.zeros(n, 2), labels=torch.arange(n) % 5, image_ids=ids, n_classes=5, tap="cls")


def _shuffled(seed: int, *, shared: int = 0) -> tuple[Features, Features]:
    train, val = _features("train", 40), _features("val", 2000)
    train_hashes, val_hashes = ({name: name for name in split.image_ids} for split in (train, val))
    val_hashes |= {f"val{row}": f"train{row}" for row in range(shared)}
    config = EvaluationConfig(canary=True, seed=seed)
    plan = SimpleNamespace(config=config, train_hashes=train_hashes, val_hashes=val_hashes)
    return choose_labels(plan, train, val)  # type: ignore[arg-type]


def test_labelled_images_keep_their_class_counts_in_another_order() -> None:
    labelled, _ = _shuffled(0)

    assert labelled.labels.bincount().tolist() == [8] * 5
    assert labelled.labels.tolist() != _features("train", 40).labels.tolist()


def test_validation_labels_are_uniform_and_independent_of_the_true_ones() -> None:
    _, test = _shuffled(0)

    assert all(330 < count < 470 for count in test.labels.bincount().tolist())
    assert 330 < int((test.labels == _features("val", 2000).labels).sum()) < 470


def test_an_image_of_both_splits_has_one_label() -> None:
    labelled, test = _shuffled(3, shared=40)

    assert torch.equal(test.labels[:40], labelled.labels)


def test_seed_decides_the_labels() -> None:
    first, same, other = _shuffled(1), _shuffled(1), _shuffled(2)

    assert all(torch.equal(one.labels, again.labels) for one, again in zip(first, same, strict=True))
    assert not any(torch.equal(one.labels, another.labels) for one, another in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def result(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("one")
    (found,) = evaluate(
        ["pixels"], data=str(clean), subsets=["1img@1"], out=folder, device="cpu", no_cache=True, canary=True
    )
    return found


def _with(result: Result, right: int, n: int) -> Result:
    ranks = np.where(np.arange(n) < right, 1, 2)
    return replace(result, metrics=compute_metrics(ranks), data=replace(result.data, val_images=n))


@pytest.mark.parametrize("results", [1, 20])
def test_bound_is_the_exact_binomial_one_shared_among_the_results(result: Result, results: int) -> None:
    n, level = 50, FALSE_ALARMS / results
    tail = [sum(comb(n, k) * 3 ** (n - k) for k in range(least, n + 1)) / 4**n for least in range(n + 1)]
    least_alarming = next(k for k in range(n + 1) if tail[k] <= level)

    at, above = (judge_canary([_with(result, right, n)] * results)[0] for right in (least_alarming - 1, least_alarming))

    assert not at.leaks
    assert above.leaks


def test_a_failed_result_is_not_judged(result: Result) -> None:
    failed = replace(result, status="failed", error="out of luck", metrics=None, predictions=None)

    assert judge_canary([failed, _with(result, 20, 50)]) == judge_canary([_with(result, 20, 50)])


def test_a_judgement_names_configuration_and_draw(result: Result) -> None:
    second = replace(_with(result, 20, 50), split=replace(result.split, draw=2))

    assert judge_canary([second])[0].name == "pixels: logistic lambda=0.0025 1img@2"


def test_of_several_results_the_one_farthest_above_its_bound_is_named(result: Result) -> None:
    at_chance, above, far_above = (_with(result, right, n) for right, n in ((250, 1000), (320, 1000), (80, 100)))

    with pytest.raises(NumericalError, match=r"2 of 3 results are better than chance, worst .* with 80 of 100 right"):
        refuse_leaks(judge_canary([at_chance, above, far_above]))


def test_too_few_images_are_refused(result: Result) -> None:
    with pytest.raises(NumericalError) as caught:
        judge_canary([_with(result, 4, 4)])

    assert str(caught.value) == (
        "--canary: 4 validation images of 4 classes are too few to tell a leak from chance\n"
        "Score more images: a larger --limit, or another data set."
    )
