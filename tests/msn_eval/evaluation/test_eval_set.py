"""Test sets: the same fits, scored on further images and restricted to their classes."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import distributed

from msn_eval import evaluate
from msn_eval.config.recipes import LinearRecipe
from msn_eval.config.request import EvaluationConfig
from msn_eval.distributed.group import ALONE, Group
from msn_eval.errors import ComparisonError, DataError, UsageError
from msn_eval.evaluation import evaluate as evaluation
from msn_eval.evaluation.baseline_plan import make_baseline_plans
from msn_eval.evaluation.cost_estimate import estimate_cost
from msn_eval.evaluation.eval_set import EvalSet
from msn_eval.evaluation.plan import make_plan
from msn_eval.results.baseline import make_baseline
from msn_eval.results.record import Predictions, Result, read_predictions
from msn_eval.results.verification import verify_results

_TINTS = {"ant": (70, 0, 0), "bee": (0, 70, 0), "cat": (0, 0, 70), "dog": (40, 40, 0)}
OnRanks = Callable[..., list[Any]]
_PROBES = ("logistic", "knn", "ncm", "ridge", "linear")


def _write_class(folder: Path, name: str, count: int, *, seed: int, file: str = "{}.png") -> None:
    """Write images of noise with the tint of a class."""
    generator = np.random.default_rng([seed, *name.encode()])
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = generator.integers(0, 180, (36, 40, 3)) + np.array(_TINTS[name])
        Image.fromarray(pixels.astype(np.uint8)).save(folder / file.format(number))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four classes with six training and five validation images each."""
    root = tmp_path_factory.mktemp("onefit") / "noise"
    for name in _TINTS:
        _write_class(root / "train" / name, name, 6, seed=0)
        _write_class(root / "val" / name, name, 5, seed=1)
    return root


@pytest.fixture(scope="module")
def other(noise: Path) -> Path:
    """Return class folders without splits: seven images of each of two of the classes, the last first."""
    for name in ("dog", "bee"):
        _write_class(noise.parent / "other" / name, name, 7, seed=2)
    return noise.parent / "other"


def _evaluate(noise: Path, out: Path, **options: Any) -> list[Result]:
    given: dict[str, Any] = {
        "subsets": "2imgs@1",
        "probes": ["logistic", "knn"],
        "k": 3,
        "device": "cpu",
        "no_cache": True,
    }
    return evaluate("pixels", data=noise, out=out, **given | options)


@pytest.fixture(scope="module")
def measured(noise: Path, other: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], Path]:
    """Return the records of all probes on the validation images, on these as a test set, and on two of the classes."""
    out = tmp_path_factory.mktemp("measured")
    linear = {"lr": 0.5, "epochs": 3}
    return _evaluate(noise, out, tests=[noise, other], probes=_PROBES, linear=linear), out


def _read(result: Result, out: Path) -> Predictions:
    return read_predictions(out / f"{result.id}.npz")


def _of(results: Sequence[Result], probe: str, data: str, *, test: bool = True) -> Result:
    (found,) = (
        result
        for result in results
        if (result.probe.name, result.data.name) == (probe, data) and ("trained_on" in result.protocol) == test
    )
    return found


@pytest.mark.parametrize("probe", _PROBES)
def test_validation_images_as_a_test_set_have_the_same_predictions(
    measured: tuple[list[Result], Path], probe: str
) -> None:
    results, out = measured
    own, test = (_of(results, probe, "noise", test=is_test) for is_test in (False, True))

    assert own.protocol_id != test.protocol_id
    assert own.metrics == test.metrics
    first, second = (vars(_read(result, out)) for result in (own, test))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("probe", _PROBES)
def test_record_of_a_test_set_is_of_its_images_and_classes(measured: tuple[list[Result], Path], probe: str) -> None:
    results, out = measured
    own, test = _of(results, probe, "noise", test=False), _of(results, probe, "other")

    assert (test.data.classes, test.data.val_images, test.data.trained_on, test.data.trained_classes) == (
        2,
        14,
        "noise",
        4,
    )
    assert test.protocol["data"] == {"sha256": test.data.sha256, "class_map_sha256": test.data.class_map_sha256}
    assert test.protocol["trained_on"] == own.data.class_map_sha256
    assert (test.split, test.probe) == (own.split, own.probe)
    predictions = _read(test, out)
    assert predictions.label.tolist() == [0] * 7 + [1] * 7
    assert set(predictions.prediction.tolist()) <= {0, 1}


def test_protocols_of_validation_images_are_those_without_test_sets(
    measured: tuple[list[Result], Path], noise: Path, tmp_path: Path
) -> None:
    alone = _evaluate(noise, tmp_path)

    assert {result.id for result in alone} <= {result.id for result in measured[0] if result.data.trained_on is None}


def test_stored_predictions_of_test_sets_are_verified(measured: tuple[list[Result], Path]) -> None:
    verification = verify_results([measured[1]])

    assert (verification.records, verification.faults) == (15, ())


def test_each_image_is_read_once_and_each_fit_made_once(
    noise: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(name: str, function: Callable[..., Any], size: Callable[..., int] = lambda *_: 1) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            calls[name] += size(*arguments)
            return function(*arguments, **options)

        return counted

    fit, extract = evaluation.fit_probe, evaluation.extract_features
    monkeypatch.setattr(evaluation, "fit_probe", count("fits", fit))
    monkeypatch.setattr(evaluation, "extract_features", count("images", extract, lambda encoder, images: len(images)))

    results = _evaluate(noise, tmp_path, tests=[other, noise], subsets=["2imgs@1", "2imgs@2"])

    assert len(results) == 2 * 2 * 3
    labelled = len(
        make_plan(EvaluationConfig(checkpoint=["pixels"], data=str(noise), subset=["2imgs@1", "2imgs@2"])).train_hashes
    )
    assert calls == {"fits": 2 * 2, "images": labelled + 14 + 20}  # the validation images are not read again


def test_finished_validation_results_are_kept_when_a_test_set_is_added(
    noise: Path, other: Path, tmp_path: Path
) -> None:
    before = {result.id: result.created for result in _evaluate(noise, tmp_path)}

    after = _evaluate(noise, tmp_path, tests=other)

    assert before.items() <= {result.id: result.created for result in after}.items()
    assert len(after) == 2 * len(before)


def test_classes_renamed_by_a_map_are_another_protocol_with_the_same_predictions(
    noise: Path, other: Path, measured: tuple[list[Result], Path], tmp_path: Path
) -> None:
    renamed = tmp_path / "other"
    renamed.mkdir()
    for name in ("bee", "dog"):
        (renamed / f"the {name}").symlink_to(other / name)
    (tmp_path / "map.txt").write_text("the bee,bee\nthe dog\tdog\nunused,bee\n")

    results = _evaluate(noise, tmp_path / "out", tests=renamed, class_map=tmp_path / "map.txt")

    own, mapped = _of(measured[0], "knn", "other"), _of(results, "knn", "other")
    assert (mapped.metrics, mapped.data.class_map_sha256) == (own.metrics, own.data.class_map_sha256)
    assert mapped.protocol_id != own.protocol_id
    assert verify_results([tmp_path / "out"]).faults == ()


def test_imagenet_v2_is_matched_by_number_not_by_the_order_of_names(tmp_path: Path) -> None:
    names = [*_TINTS, *_TINTS, *_TINTS]
    for number, name in enumerate(names):
        for split in ("train", "val"):
            _write_class(
                tmp_path / "imagenet" / split / f"n{number:08d}", name, 2, seed=number, file=f"{number}_{{}}.png"
            )
        _write_class(tmp_path / "v2" / str(number), name, 2, seed=number, file=f"{number}_{{}}.png")

    results = _evaluate(tmp_path / "imagenet", tmp_path / "out", tests=tmp_path / "v2", subsets="2imgs@1", probes="ncm")

    own, test = (_of(results, "ncm", name, test=name == "v2") for name in ("imagenet", "v2"))
    assert own.metrics is not None
    assert own.metrics.top1 == 1  # train, val and V2 have the same images
    assert own.metrics == test.metrics
    assert test.data.class_map_sha256 == own.data.class_map_sha256


def test_real_counts_each_of_the_labels_of_an_image_as_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, number = tmp_path / "imagenet", 0
    for label, name in enumerate(_TINTS):
        _write_class(root / "train" / name, name, 4, seed=0)
        for _ in range(4):
            number += 1
            file = f"ILSVRC2012_val_{number:08d}.png"
            _write_class(tmp_path / str(number), name, 1, seed=label, file=file)
            (root / "val" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / str(number) / file).rename(root / "val" / name / file)
    for number, name, own in ((7, "dog", "bee"), (12, "ant", "cat")):  # these will be taken for another class
        for path in (root / "val" / own).glob(f"*{number:08d}.png"):
            path.write_bytes((root / "train" / name / "0.png").read_bytes())
    labels = [[1, 0], [0], [0], [], [1], [3, 1], [1, 3], [1, 2], [2], [3], [2, 3], [0, 2], [3], [3], [], [0, 3]]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    extract = evaluation.extract_features
    passes: list[int] = []
    monkeypatch.setattr(
        evaluation,
        "extract_features",
        lambda *args, **options: passes.append(len(args[1])) or extract(*args, **options),
    )

    results = _evaluate(root, tmp_path / "out", tests=f"real:{tmp_path / 'real.json'}", subsets="full")

    assert passes == [16, 16]  # labelled and validation images
    for probe in ("logistic", "knn"):
        own, real = (_of(results, probe, name, test=name != "imagenet") for name in ("imagenet", "imagenet (ReaL)"))
        predicted = _read(own, tmp_path / "out")
        numbers = [int(name[-12:-4]) for name in predicted.image.tolist()]
        scored = [(labels[number - 1], guess) for number, guess in zip(numbers, predicted.prediction, strict=True)]
        right = [guess in answers for answers, guess in scored if answers]
        assert all(predicted.prediction[numbers.index(number)] == guess for number, guess in ((7, 3), (12, 0)))
        assert real.metrics is not None
        assert (real.metrics.top1, real.metrics.n) == (sum(right) / 14, 14)
        assert real.protocol_id != own.protocol_id
        stored = _read(real, tmp_path / "out")
        by_number = {int(name[-12:-4]): label for name, label in zip(stored.image.tolist(), stored.label, strict=True)}
        assert (by_number[1], by_number[6], by_number[10]) == (
            0,
            1,
            3,
        )  # the ImageNet label if it is right, else the first
    assert verify_results([tmp_path / "out"]).faults == ()


def _make_scores_set(columns: tuple[int, ...] | None, answers: list[list[int]] | None) -> EvalSet:
    rows = None if answers is None else torch.tensor(answers)
    return EvalSet(name="", images=None, extracted=None, hashes={}, columns=columns, answers=rows)  # type: ignore[arg-type]


def test_image_without_a_vote_for_any_class_of_the_test_set_has_equal_scores() -> None:
    inf = float("inf")
    scores = torch.tensor([[-inf, 1.0, -inf], [2.0, 3.0, -inf]])

    restricted = _make_scores_set((0, 2), None).restrict(scores)

    assert restricted.tolist() == [[0.0, 0.0], [2.0, -inf]]


def test_label_has_the_score_of_the_best_class_that_is_right() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.1, 0.7, 0.2]])

    restricted = _make_scores_set(None, [[0, 1], [0, 1], [2, 2]]).restrict(scores)

    expected = [[0.7, 0.1, 0.2], [0.5, 0.3, 0.2], [0.1, 0.7, 0.2]]
    assert restricted.tolist() == pytest.approx(np.array(expected))


def test_limit_and_skipped_images_apply_to_test_sets(noise: Path, other: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    for name in ("bee", "dog"):
        (broken / name).mkdir(parents=True)
        for path in (other / name).iterdir():
            (broken / name / path.name).write_bytes(path.read_bytes())
    (broken / "bee" / "0.png").write_bytes(b"no image")

    with pytest.raises(DataError, match="1 image cannot be used") as caught:
        _evaluate(noise, tmp_path / "out", tests=broken)
    results = _evaluate(noise, tmp_path / "out", tests=broken, limit=3, on_bad_image="skip", probes="ncm")

    assert str(broken / "bee" / "0.png") in str(caught.value)
    assert [(result.data.val_images, result.data.skipped) for result in results] == [(12, 0), (5, 1)]


@pytest.mark.parametrize("name", ["missing", "real:missing.json"])
def test_missing_test_set_is_a_data_error(noise: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        _evaluate(noise, tmp_path, tests=name)

    assert caught.value.where is not None
    assert "missing" in caught.value.where


def test_two_names_of_one_test_set_are_refused(noise: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(other)

    with pytest.raises(DataError, match="two test sets hold the same images: other and other"):
        _evaluate(noise, tmp_path / "out", tests=[other, tmp_path / "link"])


def test_cost_estimate_counts_the_images_of_test_sets(noise: Path, other: Path) -> None:
    config = EvaluationConfig(
        checkpoint=["pixels"], data=str(noise), test=[str(other)], subset=["2imgs@1"], device="cpu", no_cache=True
    )

    ((cost,), _) = estimate_cost(make_plan(config), run_own_code=False)

    assert cost.read == 8 + 20 + 14


def test_baseline_with_test_sets_is_measured_again_on_each(
    measured: tuple[list[Result], Path], noise: Path, other: Path
) -> None:
    results, out = measured
    baseline = make_baseline(results, [out])
    config = EvaluationConfig(checkpoint=["pixels"], data=str(noise), device="cpu", no_cache=True)

    with pytest.raises(ComparisonError, match=r"the baseline has test sets, and none is given: .*, on "):
        make_baseline_plans(baseline, config)
    tests = [str(noise), str(other)]
    (plan,) = make_baseline_plans(baseline, EvaluationConfig(**vars(config) | {"test": tests}))

    assert baseline.data == "noise"
    assert {task.protocol_id for task in plan.tasks} == {result.protocol_id for result in results}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"test": ["x"], "probe": ["finetune"]},
            "--test: fine-tuned networks are scored on the validation images only",
        ),
        ({"test": ["x"], "canary": True}, "--test: --canary looks for leaks into the validation images"),
        ({"class_map": "file"}, "--class-map: there is no test set"),
        ({"test": ["x", "y", "x"]}, "--test: a test set is given twice"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluationConfig(**options)


def test_two_ranks_give_the_records_of_one(noise: Path, other: Path, tmp_path: Path, on_ranks: OnRanks) -> None:
    def measure(place: str) -> list[str]:
        is_alone = not distributed.is_initialized()
        group = ALONE if is_alone else Group(rank=distributed.get_rank(), world=distributed.get_world_size())
        config = EvaluationConfig(
            checkpoint=["pixels"], data=str(noise), test=[str(other), str(noise)], subset=["2imgs@1"], probe=[*_PROBES],
            k=[3], device="cpu", no_cache=True, out=str(tmp_path / place), linear=LinearRecipe(lr=0.5, epochs=3),
        )  # fmt: skip
        results = evaluation.evaluate_checkpoint(make_plan(config), "pixels", group=group)
        return sorted(result.id for result in results)

    ids = measure("alone")

    assert on_ranks(measure, "ranks") == [ids, []]
    assert len(ids) == 3 * len(_PROBES)
    for name in ids:
        alone, ranks = (read_predictions(tmp_path / place / f"{name}.npz").arrays for place in ("alone", "ranks"))
        for (
            array,
            values,
        ) in alone.items():  # ranks add in another order, which changes the last digits of probabilities
            assert np.array_equal(values, ranks[array]) or np.allclose(values, ranks[array], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return stand-ins for ImageNet and three test sets of it: the classes, folders and file names of each, with tiny images.

    Images of a class are the same noise, but for those of ImageNet-R: they show the next class of that set.
    """
    root = tmp_path_factory.mktemp("imagenet")
    synsets = (Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    few = {
        "imagenet-a": synsets[::5],
        "imagenet-r": synsets[2::5],
    }  # 200 each; the published choice of them is another one
    files = {
        **{f"ILSVRC2012/train/{name}/{name}_1.JPEG": name for name in synsets},
        **{f"ILSVRC2012/val/{name}/ILSVRC2012_val_{row:08d}.JPEG": name for row, name in enumerate(synsets, start=1)},
        **{f"imagenet-a/{name}/0.00{row:04d}_fox _ cat_0.9.jpg": name for row, name in enumerate(few["imagenet-a"])},
        **dict(
            zip((f"imagenet-r/{name}/art_0.jpg" for name in few["imagenet-r"]), few["imagenet-r"][1:], strict=False)
        ),
        f"imagenet-r/{few['imagenet-r'][-1]}/art_0.jpg": few["imagenet-r"][0],
        **{f"sketch/{name}/sketch_{number}.JPEG": name for name in synsets for number in (3, 12)},
    }
    for name, shown in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng([*shown.encode()]).integers(0, 255, (8, 8, 3), np.uint8)).save(
            path, "PNG"
        )
    for name in few:
        (root / name / "README.txt").write_text("See the paper.\n")
    return root


@pytest.fixture(scope="module")
def on_imagenet(imagenet: Path) -> dict[str, Result]:
    """Return the records of the full number of classes by the name of the set that is scored."""
    options: dict[str, Any] = {"subsets": "full", "probes": "ncm", "device": "cpu", "no_cache": True}
    tests = [imagenet / name for name in ("imagenet-a", "imagenet-r", "sketch")]
    results = evaluate("pixels", data=imagenet / "ILSVRC2012", tests=tests, out=imagenet / "runs", **options)
    return {result.data.name: result for result in results}


@pytest.mark.parametrize(
    ("name", "classes", "images", "top1"),
    [
        ("ILSVRC2012", 1000, 1000, 1),
        ("imagenet-a", 200, 200, 1),
        ("imagenet-r", 200, 200, 0),
        ("sketch", 1000, 2000, 1),
    ],
)
def test_test_sets_of_imagenet_are_scored_on_the_classes_of_their_folders(
    on_imagenet: dict[str, Result], name: str, classes: int, images: int, top1: float
) -> None:
    result = on_imagenet[name]

    assert result.metrics is not None
    assert (result.data.classes, result.metrics.n, result.metrics.top1) == (classes, images, top1)
    assert result.data.trained_classes == (None if name == "ILSVRC2012" else 1000)
