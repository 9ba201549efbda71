"""The corridor from Python: the same numbers whatever the batch, the loader and the moment."""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msn_eval import evaluate
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.loader import PixelBatch
from msn_eval.distributed.group import Group
from msn_eval.errors import CheckpointError, StoreError, UsageError
from msn_eval.evaluation import evaluate as evaluation
from msn_eval.evaluation import plan as plan_module
from msn_eval.evaluation.evaluate import evaluate_checkpoint, loading_of, pending_pool, prepare
from msn_eval.evaluation.plan import Plan, make_plan
from msn_eval.features import cache as feature_cache
from msn_eval.features.extraction import Extraction, Loading
from msn_eval.results.record import Result, read_predictions, write_result

_NETWORK = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an image folder of four classes of coloured noise, eight train and twenty val images each."""
    root = tmp_path_factory.mktemp("data") / "noise"
    generator = np.random.default_rng(0)
    for name, tint in (("a", (60, 0, 0)), ("b", (0, 60, 0)), ("c", (0, 0, 60)), ("d", (30, 30, 0))):
        for split, count in (("train", 8), ("val", 20)):
            target = root / split / name
            target.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 180, (40, 36, 3)) + np.array(tint)
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number}.png")
    return root


def _evaluate(folder: Path, out: Path, **options: object) -> list[Result]:
    return evaluate(
        [_NETWORK],
        data=str(folder),
        subsets=["2imgs"],
        probes=["logistic", "knn", "ncm"],
        out=out,
        device="cpu",
        no_cache=True,
        **options,
    )


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return _evaluate(folder, tmp_path_factory.mktemp("reference"))


def _outcome(results: list[Result]) -> list[tuple[str, object]]:
    return [(result.id, result.metrics) for result in results]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": "1"},
        {"batch_size": "7"},
        {"batch_size": "64"},
        {"workers": "0"},
        {"workers": "1"},
        {"workers": "2"},
    ],
    ids=str,
)
def test_batch_and_workers_move_no_metric(
    options: dict[str, object], folder: Path, reference: list[Result], tmp_path: Path
) -> None:
    assert _outcome(_evaluate(folder, tmp_path, **options)) == _outcome(reference)


def test_another_seed_is_another_network(folder: Path, reference: list[Result], tmp_path: Path) -> None:
    other = _evaluate(folder, tmp_path, seed=1)

    assert {result.id for result in other}.isdisjoint({result.id for result in reference})


def test_each_setting_and_draw_has_a_record(reference: list[Result]) -> None:
    measured = {(result.probe.name, str(dict(result.probe.params)), result.split.draw) for result in reference}

    settings = [("logistic", "{'lambda': 0.0025}"), ("ncm", "{}")]  # every default k is above the eight labelled images
    assert measured == {(*setting, draw) for setting in settings for draw in (1, 2, 3)}


def test_one_search_serves_every_k_and_temperature(folder: Path, tmp_path: Path) -> None:
    together = _evaluate(folder, tmp_path / "together", k=[1, 3, 5], temperature=[0.07, 0.2])
    alone = [
        result
        for k in (1, 3, 5)
        for temperature in (0.07, 0.2)
        for result in _evaluate(folder, tmp_path / f"{k}-{temperature}", k=[k], temperature=[temperature])
    ]

    assert dict(_outcome(together)) == dict(_outcome(alone))


def test_solvers_share_their_id_and_their_predictions(
    folder: Path, reference: list[Result], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = _evaluate(folder, tmp_path, solver="lbfgs")

    assert [(r.id, r.metrics) for r in other] == _outcome(reference)
    assert {r.probe.solver for r in other if r.probe.name == "logistic"} == {"lbfgs"}


def test_predictions_are_those_of_the_named_images(folder: Path, tmp_path: Path) -> None:
    result = _evaluate(folder, tmp_path)[0]

    assert result.predictions is not None
    stored = read_predictions(tmp_path / result.predictions)
    assert [image.decode().partition("/")[0] for image in stored.image] == ["abcd"[label] for label in stored.label]


def test_logistic_records_carry_a_certificate_that_meets_its_target(reference: list[Result]) -> None:
    certificates = [result.probe.certificate for result in reference if result.probe.name == "logistic"]

    assert all(certificate is not None and 0 <= certificate <= 1e-6 for certificate in certificates)


def test_an_unknown_option_is_named_with_the_nearest(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean batch_size"):
        _evaluate(folder, tmp_path, batchsize=3)


def _plan(folder: Path, out: Path, **options: object) -> Plan:
    given = {"checkpoint": [_NETWORK], "data": str(folder), "subset": ["1img@1"], "out": str(out), "device": "cpu"}
    return make_plan(EvaluationConfig(**{**given, "no_cache": True, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"), [("image_pixels", 64), ("compile", True), ("seed", 1), ("precision", "bf16")]
)
def test_network_is_prepared_as_requested(folder: Path, tmp_path: Path, name: str, value: object) -> None:
    encoder = prepare(_plan(folder, tmp_path, **{name: value}), _NETWORK).encoder
    plain = prepare(_plan(folder, tmp_path), _NETWORK).encoder
    changed = {
        "image_pixels": encoder.transform.crop == 64,
        "compile": encoder.compiled,
        "seed": encoder.checkpoint.weights_sha256 != plain.checkpoint.weights_sha256,
        "precision": encoder.precision == "bf16",
    }
    assert [one for one, is_so in changed.items() if is_so] == [name]


def test_run_without_a_cache_leaves_none(folder: Path, tmp_path: Path) -> None:
    _evaluate(folder, tmp_path / "runs", cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_folder_that_ranks_share_for_a_while_is_removed_even_after_a_fault(folder: Path, tmp_path: Path) -> None:
    first = Group(rank=0, world=2, local_rank=0, host="localhost")
    with pytest.raises(StoreError, match="rows are not there"):
        list(evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK, group=first))
    assert list(tmp_path.glob(".features*")) == []


def test_costs_are_those_of_both_splits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluation.extract_features
    costs = iter([(1.0, 0.25, 0.5, 16), (4.0, 1.0, 2.25, 8)])

    def priced(*given: object, **named: object) -> Extraction:
        seconds, decoding, encoding, batch_size = next(costs)
        found = real(*given, **named)  # type: ignore[arg-type]
        return replace(found, seconds=seconds, decode_seconds=decoding, encode_seconds=encoding, batch_size=batch_size)

    monkeypatch.setattr(evaluation, "extract_features", priced)
    (result,) = evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK)
    times = result.timing_s
    assert (times.images_per_second, times.decode_share, times.encode_share) == (84 / 5, 1.25 / 5, 2.75 / 5)
    assert result.environment.batch_size == 8
    assert times.total == pytest.approx(times.extract + times.probe, abs=1e-3)


def _facts(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """Give what a rank tells the others before it works."""
    told: list[Mapping[str, str]] = []
    monkeypatch.setattr(evaluation, "check_equal_across_ranks", lambda group, what, facts: told.append(facts))
    next(evaluate_checkpoint(plan, _NETWORK))
    return told[0]


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({"seed": 1}, ["weights"]),
        ({"precision": "bf16"}, ["precision", "tasks"]),
        ({"limit": 1}, ["validation images", "tasks"]),
        ({"probe": ["ncm"]}, ["tasks"]),
        ({"subset": ["1img@2"]}, ["labelled images", "tasks"]),
    ],
    ids=str,
)
def test_ranks_tell_each_other_what_they_are_about_to_measure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], differ: list[str]
) -> None:
    mine = _facts(_plan(folder, tmp_path / "mine"), monkeypatch)
    other = _facts(_plan(folder, tmp_path / "other", **options), monkeypatch)
    assert {name for name in mine if mine[name] != other[name]} == set(differ)


def test_labelled_images_that_changed_are_told_between_ranks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shutil.copytree(folder, tmp_path / "changed")
    for file in (changed / "train").rglob("*.png"):
        Image.new("RGB", (9, 9)).save(file)
    mine, other = (
        _facts(_plan(data, tmp_path / name, data=str(data)), monkeypatch)
        for name, data in (("mine", folder), ("other", changed))
    )
    assert {name for name in mine if mine[name] != other[name]} == {"labelled images"}


def test_network_that_changes_while_it_is_asked_gives_no_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drifting_network.py").write_text(
        "import torch\n"
        "class Drifting(torch.nn.Module):\n"
        "    image_pixels = 8\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.seen = torch.nn.Parameter(torch.zeros(1))\n"
        "    def forward(self, images):\n"
        "        self.seen.data += 1\n"
        "        return images.flatten(1)\n"
        "def make(): return Drifting()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "py:drifting_network:make"
    with pytest.raises(CheckpointError, match="its weights changed"):
        list(evaluate_checkpoint(_plan(folder, tmp_path / "runs", checkpoint=[name]), name))
    assert list((tmp_path / "runs").glob("*.json")) == []


def test_failed_result_is_tried_again(folder: Path, tmp_path: Path) -> None:
    plan = _plan(folder, tmp_path)
    (result,) = evaluate_checkpoint(plan, _NETWORK)
    write_result(tmp_path, replace(result, status="failed", error="no", metrics=None, predictions=None), None)
    assert [one.status for one in evaluate_checkpoint(plan, _NETWORK)] == ["ok"]


def test_result_is_written_before_it_is_told(folder: Path, tmp_path: Path) -> None:
    result = next(evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK))
    assert (tmp_path / f"{result.id}.json").exists()


@pytest.mark.parametrize(("options", "size"), [({}, 256), ({"batch_size": "7"}, 7)], ids=str)
def test_record_has_the_batch_size(folder: Path, tmp_path: Path, options: dict[str, object], size: int) -> None:
    (result,) = evaluate_checkpoint(_plan(folder, tmp_path, **options), _NETWORK)
    assert result.environment.batch_size == size


def test_only_taps_of_what_is_left_are_taken(folder: Path, tmp_path: Path) -> None:
    list(evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK))
    ready = prepare(_plan(folder, tmp_path, probe=["logistic", "ncm"]), _NETWORK)
    assert (len(set(ready.taps.values())), len(ready.pending_taps)) == (2, 1)


def test_result_of_another_transform_is_not_taken_for_this_one(folder: Path, tmp_path: Path) -> None:
    plan = _plan(folder, tmp_path)
    (result,) = evaluate_checkpoint(plan, _NETWORK)
    transform = replace(result.features.transform, mean=(0.1, 0.2, 0.3))
    other = replace(result, features=replace(result.features, transform=transform), predictions=None)
    write_result(tmp_path, other, None)
    with pytest.raises(StoreError, match="holds a result of the same weights"):
        prepare(plan, _NETWORK)


def test_solver_that_did_not_converge_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluation.fit

    def unfinished(*given: object, **named: object) -> object:
        found = real(*given, **named)  # type: ignore[arg-type]
        return replace(found, settings=tuple(replace(one, converged=False) for one in found.settings))

    monkeypatch.setattr(evaluation, "fit", unfinished)
    assert [one.status for one in evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK)] == ["not_converged"]


def test_time_of_a_setting_is_its_own(folder: Path, tmp_path: Path) -> None:
    plan = _plan(folder, tmp_path, probe=["knn"], k=[1, 2])
    seconds = []
    for result in evaluate_checkpoint(plan, _NETWORK):
        seconds.append(result.timing_s.probe)
        time.sleep(0.5)
    assert len(seconds) == 2
    assert seconds[1] < 0.5


def test_checkpoint_is_read_as_requested(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def refuse(name: str, **named: object) -> None:
        asked.update(named)
        raise CheckpointError("enough was seen", where=name, hint="")

    monkeypatch.setattr(evaluation, "read_checkpoint", refuse)
    options = {"arch": "a", "checkpoint_key": "k", "allow_missing": ["m"], "seed": 3}
    with pytest.raises(CheckpointError, match="enough"):
        prepare(_plan(folder, tmp_path, **options), _NETWORK)
    assert asked == {"arch": "a", "key": "k", "allow_missing": ("m",), "seed": 3}


def test_images_come_as_requested() -> None:
    request = EvaluationConfig(decoder="torchvision", batch_size="7", workers="0")
    assert loading_of(request) == Loading(decoder="torchvision", batch_size=7, workers=0)


def test_only_images_of_what_is_left_are_read(folder: Path, tmp_path: Path) -> None:
    list(evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK))
    plan = _plan(folder, tmp_path, subset=["1img@1", "1img@2"])
    assert set(pending_pool(plan, prepare(plan, _NETWORK)).ids) == set(plan.subsets[1].image_ids)


def test_bf16_and_fp16_stand_for_each_other(folder: Path, tmp_path: Path) -> None:
    list(evaluate_checkpoint(_plan(folder, tmp_path, precision="bf16"), _NETWORK))
    (known,) = prepare(_plan(folder, tmp_path, precision="fp16"), _NETWORK).known
    assert known.features.precision == "bf16"


def test_rank_computes_on_the_gpu_of_its_number(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    request = EvaluationConfig(
        checkpoint=[_NETWORK], data=str(folder), subset=["1img@1"], out=str(tmp_path), no_cache=True
    )
    assert str(make_plan(request, local_rank=1).device) == "cuda:1"


def test_same_weights_under_two_names_have_one_result(folder: Path, tmp_path: Path) -> None:
    import torch

    for name in ("one.pth", "two.pth"):
        torch.save(prepare(_plan(folder, tmp_path), _NETWORK).encoder.network.state_dict(), tmp_path / name)
    names = [str(tmp_path / name) for name in ("one.pth", "two.pth")]
    arch = _NETWORK.partition(":")[2]
    found = evaluate(names, data=str(folder), subsets=["1img@1"], out=tmp_path, device="cpu", no_cache=True, arch=arch)
    assert len(found) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_every_unreadable_image_is_skipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    for name in ("a/0.png", "b/3.png", "b/4.png"):
        (damaged / "val" / name).write_bytes(b"")
    used = set()
    real = plan_module.load_pixels

    def counted(*given: object, **named: object) -> Iterator[PixelBatch]:
        used.add(named["workers"])
        return real(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(plan_module, "load_pixels", counted)
    plan = _plan(damaged, tmp_path / "runs", on_bad_image="skip", workers=str(workers))
    assert (plan.skipped_val, used) == (("a/0.png", "b/3.png", "b/4.png"), {workers})


def test_hashes_of_both_splits_are_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msn_eval.data.hashing._SETTLED_NS", 0)
    _plan(folder, tmp_path, no_cache=False, cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 2


def test_labelled_images_among_the_validation_images_are_counted_draw_by_draw(folder: Path, tmp_path: Path) -> None:
    leaky = tmp_path / "leaky"
    shutil.copytree(folder, leaky)
    plan = make_plan(
        EvaluationConfig(checkpoint=["pixels"], data=str(leaky), subset=["2imgs"], device="cpu", no_cache=True)
    )
    first, second, third = (subset.image_ids for subset in plan.subsets)
    shared = next(image_id for image_id in first if image_id not in second)
    (leaky / "val" / "a" / "copy.png").write_bytes((leaky / "train" / shared).read_bytes())

    found = _evaluate(leaky, tmp_path / "out")

    overlaps = {result.split.draw: result.split.overlap for result in found}
    assert overlaps == {1: 1, 2: 0, 3: int(shared in third)}


def test_features_that_collapsed_are_told_and_scored_at_chance(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abcd":
        for split, count in (("train", 2), ("val", 5)):
            (tmp_path / "black" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / "black" / split / name / f"{number}.png")

    given = {"data": str(tmp_path / "black"), "subsets": ["2imgs@1"], "out": tmp_path / "runs", "device": "cpu"}
    results = evaluate(["pixels"], probes=["logistic", "ridge", "ncm"], no_cache=True, **given)

    assert [result.metrics.top1 for result in results if result.metrics] == [0.25] * 3
    told = [record.getMessage() for record in caplog.records if "collapsed representation" in record.getMessage()]
    assert [text.partition(": collapsed")[0] for text in told] == [
        f"pixels: tap pixels, {part} images" for part in ("labelled", "validation")
    ]
    assert {(result.features.degenerate or "").partition(":")[0] for result in results} == {"labelled images"}
    assert evaluate(["pixels"], probes=["logistic", "ridge", "ncm"], no_cache=True, **given) == results


def test_validation_labels_that_would_reveal_the_best_layer_move_neither_the_choice_nor_a_prediction(
    folder: Path, tmp_path: Path
) -> None:
    revealing = tmp_path / "revealing"
    for split, names in (("train", "abcd"), ("val", "bcda")):  # every class's validation images under another name
        for name, other in zip("abcd", names, strict=True):
            shutil.copytree(folder / split / name, revealing / split / other)
    options = {"subsets": ["5imgs@1"], "probes": ["linear"], "device": "cpu", "no_cache": True}
    recipe = {"lr_first": 0.01, "lr_last": 100.0, "lrs": 5, "epochs": 20}

    (told,) = evaluate(["pixels"], data=str(folder), out=tmp_path / "a", linear=recipe, **options)
    (other,) = evaluate(["pixels"], data=str(revealing), out=tmp_path / "b", linear=recipe, **options)

    assert told.probe.chosen is not None
    assert other.probe == told.probe
    assert told.predictions is not None
    assert other.predictions is not None
    first, second = (
        read_predictions(tmp_path / "a" / told.predictions),
        read_predictions(tmp_path / "b" / other.predictions),
    )
    assert (np.roll(second.prediction, -20) == first.prediction).all()
    assert (np.roll(second.label, -20) != first.label).all()


def test_one_image_a_class_fails_for_a_grid_and_other_subsets_are_measured(folder: Path, tmp_path: Path) -> None:
    grid = {"lrs": 2, "epochs": 5}

    results = evaluate(
        ["pixels"],
        data=str(folder),
        subsets=["1img@1", "2imgs@1"],
        probes=["linear"],
        out=tmp_path,
        device="cpu",
        no_cache=True,
        linear=grid,
    )

    assert [(one.split.subset, one.status) for one in results] == [("1img", "failed"), ("2imgs", "ok")]
    assert "one a class" in str(results[0].error)


def test_a_bank_that_memory_has_no_room_for_gives_the_same_linear_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measured(name: str) -> Result:
        recipe = {"lrs": 3, "epochs": 5, "batch_size": 8}
        options = {"subsets": ["full"], "probes": ["linear"], "device": "cpu", "cache": str(tmp_path / f"{name} cache")}
        (result,) = evaluate(["pixels"], data=str(folder), out=tmp_path / name, linear=recipe, **options)
        return result

    in_memory = measured("memory")
    monkeypatch.setattr(feature_cache, "available_bytes", lambda: 1)
    with caplog.at_level(logging.INFO):
        streamed = measured("disk")

    assert caplog.text.count("stay on the disk") == 1  # the labelled rows alone: scores need the others at once
    assert "32 rows of 3072 features" in caplog.text
    assert (streamed.metrics, streamed.probe) == (in_memory.metrics, in_memory.probe)


def _chosen_tap(folder: Path, tmp_path: Path, taps: list[str], **options: object) -> list[Result]:
    recipe = {"taps": taps, "lrs": 2, "lr_last": 1.0, "weight_decays": 1, "epochs": 3}
    given = {"probes": ["linear"], "device": "cpu", "cache": str(tmp_path / "cache"), "linear": recipe}
    return evaluate(
        [_NETWORK], data=str(folder), subsets=["5imgs@1"], out=tmp_path / "runs", **given | {"seed": 3} | options
    )


def test_every_draw_scores_by_the_tap_that_it_chose(tmp_path: Path) -> None:
    options = {"data": "digits", "probes": ["linear"], "device": "cpu", "cache": str(tmp_path / "cache")}
    recipe = {"lrs": 1, "weight_decays": 1, "epochs": 2}

    def of(*taps: str) -> dict[int, Result]:
        found = evaluate(
            ["demo"], subsets=["5imgs"], out=tmp_path / "runs", linear=recipe | {"taps": list(taps)}, **options
        )
        return {result.split.draw: result for result in found}

    several, alone = of("mean", "cls"), {tap: of(tap) for tap in ("cls", "mean")}

    chosen = {draw: str((result.probe.chosen or {})["tap"]) for draw, result in several.items()}
    assert set(chosen.values()) == {"cls", "mean"}
    assert all(result.metrics == alone[chosen[draw]][draw].metrics for draw, result in several.items())
    assert alone["cls"][3].metrics != alone["mean"][3].metrics
    assert {one.protocol_id for one in several.values()}.isdisjoint(one.protocol_id for one in alone["mean"].values())
    (told,) = {(one.probe.params["taps"], one.features.tap, one.protocol["tap"]) for one in several.values()}
    assert told == ("cls,mean",) * 3


def test_taps_to_choose_from_share_one_pass_and_a_rerun_computes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    real = evaluation.extract_features

    def counted(*given: object, **named: object) -> Extraction:
        passes.append(named["taps"])
        return real(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "extract_features", counted)
    (first,) = _chosen_tap(folder, tmp_path, ["cls", "mean"])
    (again,) = _chosen_tap(folder, tmp_path, ["mean", "cls", "mean"])

    assert passes == [("cls", "mean")] * 2  # labelled and validation images
    assert first == again


def test_a_network_without_one_of_the_taps_to_choose_from_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        _chosen_tap(folder, tmp_path, ["cls", "cls4"])

    assert str(caught.value).startswith(f"linear.taps cls4: {_NETWORK} (")
    assert str(caught.value).endswith("has no such tap\nIt has: cls, cls-norm, mean.")
