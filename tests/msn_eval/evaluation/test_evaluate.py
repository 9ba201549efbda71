"""The pipeline from Python: the same numbers for every batch size, number of workers and interruption."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msn_eval import evaluate
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.loader import PixelBatch
from msn_eval.distributed.group import Group
from msn_eval.errors import CheckpointError, StoreError, UsageError
from msn_eval.evaluation import evaluate as evaluation
from msn_eval.evaluation import plan as plan_module
from msn_eval.evaluation.evaluate import evaluate_all, evaluate_checkpoint, pending_images, prepare
from msn_eval.evaluation.plan import Plan, make_plan
from msn_eval.features import cache as feature_cache
from msn_eval.features import extraction
from msn_eval.features.collapse import measure_spectrum
from msn_eval.features.extraction import Extraction
from msn_eval.files.json_records import add_seal
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import build_network
from msn_eval.probes.base import FittedProbe
from msn_eval.results.folder import read_results
from msn_eval.results.record import Result, encode_result, read_predictions, read_result, write_result

_NETWORK = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2"


def _write_images(root: Path, *, train: int, val: int, classes: str = "abcd") -> Path:
    """Write an image folder of coloured noise, with `train` and `val` images per class."""
    generator = np.random.default_rng(0)
    tints = {"a": (60, 0, 0), "b": (0, 60, 0), "c": (0, 0, 60), "d": (30, 30, 0)}
    for name in classes:
        for split, count in (("train", train), ("val", val)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 180, (40, 36, 3)) + np.array(tints[name])
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_images(tmp_path_factory.mktemp("data") / "noise", train=8, val=20)


def _evaluate(folder: Path, out: Path, **options: Any) -> list[Result]:
    given = {"subsets": ["2imgs"], "probes": ["logistic", "knn", "ncm"], "device": "cpu", "no_cache": True}
    return evaluate(_NETWORK, data=folder, out=out, **given | options)


def _evaluate_pixels(folder: Path, out: Path, **options: Any) -> list[Result]:
    given = {"subsets": "5imgs@1", "probes": "linear", "device": "cpu"}
    return evaluate("pixels", data=folder, out=out, **given | options)


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return _evaluate(folder, tmp_path_factory.mktemp("reference"))


def _outcome(results: list[Result]) -> list[tuple[str, object]]:
    """Return ids and accuracies. Other batches and solvers change the last digits of probabilities."""
    uncalibrated = {"nll": None, "brier": None, "ece": None}
    return [(result.id, result.metrics and replace(result.metrics, **uncalibrated)) for result in results]


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": "7"}, {"workers": "0"}, {"workers": 1}, {"workers": 2}], ids=str
)
def test_batch_size_and_workers_change_no_metric(
    options: dict[str, object], folder: Path, reference: list[Result], tmp_path: Path
) -> None:
    assert _outcome(_evaluate(folder, tmp_path, **options)) == _outcome(reference)


def test_spectrum_of_cached_features_is_measured_once_and_again_if_its_note_is_damaged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"no_cache": False, "cache": tmp_path / "cache"}
    measured = []
    monkeypatch.setattr(
        extraction, "measure_spectrum", lambda values: measured.append(len(values)) or measure_spectrum(values)
    )
    first = _evaluate(folder, tmp_path / "first", probes="logistic", **options)
    again = _evaluate(folder, tmp_path / "again", probes=["logistic", "ridge"], **options)
    assert measured == [80]
    (note,) = (tmp_path / "cache").rglob("spectrum-*")
    note.write_bytes(note.read_bytes().replace(b'"alpha":', b'"alpha":1'))

    rebuilt = _evaluate(folder, tmp_path / "rebuilt", probes="logistic", **options)

    assert measured == [80, 80]
    spectra = {(r.features.rankme, r.features.alpha, r.features.spectrum_images) for r in (*first, *again, *rebuilt)}
    assert len(spectra) == 1
    assert None not in spectra.pop()


def test_a_single_value_stands_for_a_list_of_one(folder: Path, tmp_path: Path) -> None:
    one = _evaluate(folder, tmp_path / "one", subsets="1img@1", probes="knn", k=2, temperature=0.1)
    listed = _evaluate(folder, tmp_path / "listed", subsets=["1img@1"], probes=["knn"], k=[2], temperature=[0.1])

    assert _outcome(one) == _outcome(listed)
    assert len(one) == 1


def test_each_configuration_and_draw_has_a_record(reference: list[Result]) -> None:
    measured = {(result.probe.name, str(dict(result.probe.params)), result.split.draw) for result in reference}

    configs = [("logistic", "{'lambda': 0.0025}"), ("ncm", "{}")]  # every default k is above the eight labelled images
    assert measured == {(*config, draw) for config in configs for draw in (1, 2, 3)}


def test_solvers_share_their_id_and_their_predictions(folder: Path, reference: list[Result], tmp_path: Path) -> None:
    other = _evaluate(folder, tmp_path, solver="lbfgs")

    assert _outcome(other) == _outcome(reference)
    assert {result.probe.solver for result in other if result.probe.name == "logistic"} == {"lbfgs"}


def test_predictions_are_those_of_the_named_images(folder: Path, tmp_path: Path) -> None:
    result = _evaluate(folder, tmp_path)[0]

    assert result.predictions is not None
    stored = read_predictions(tmp_path / result.predictions)
    assert [image.decode().partition("/")[0] for image in stored.image] == ["abcd"[label] for label in stored.label]


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
    assert [option for option, is_changed in changed.items() if is_changed] == [name]


def test_record_states_how_positions_are_interpolated_and_its_protocol_has_a_version_for_it(
    folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"probes": ["ncm"]}
    resized, native = (
        _evaluate(folder, tmp_path / name, **options, **more)[0]
        for name, more in (("resized", {"image_pixels": 64}), ("native", {}))
    )
    found = [
        (
            result.features.transform.positions,
            result.protocol["version"],
            "positions" in encoded["features"]["transform"],
        )
        for result, encoded in ((result, encode_result(result)) for result in (resized, native))
    ]
    assert found == [("as timm", 2, True), (None, 1, False)]


def test_run_without_a_cache_leaves_none(folder: Path, tmp_path: Path) -> None:
    _evaluate(folder, tmp_path / "runs", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_temporary_folder_of_ranks_is_removed_even_after_a_fault(folder: Path, tmp_path: Path) -> None:
    first = Group(rank=0, world=2, local_rank=0, host="localhost")
    with pytest.raises(StoreError, match="rows that were just written"):
        list(evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK, group=first))
    assert list(tmp_path.glob(".features*")) == []


def test_costs_are_those_of_both_splits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract_features = evaluation.extract_features
    costs = iter([(1.0, 0.25, 0.5, 16), (4.0, 1.0, 2.25, 8)])

    def extract(*arguments: Any, **named: Any) -> Extraction:
        seconds, decoding, encoding, batch_size = next(costs)
        extraction = extract_features(*arguments, **named)
        times = {"seconds": seconds, "decode_seconds": decoding, "encode_seconds": encoding}
        return replace(extraction, batch_size=batch_size, **times)

    monkeypatch.setattr(evaluation, "extract_features", extract)
    (result,) = evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK)
    times = result.timing_s
    assert (times.images_per_second, times.decode_share, times.encode_share) == (84 / 5, 1.25 / 5, 2.75 / 5)
    assert result.environment.batch_size == 8
    assert times.total == pytest.approx(times.extract + times.probe, abs=1e-3)


def _compared_values(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    """Return what a rank compares with the others first."""
    values: list[Mapping[str, str]] = []
    monkeypatch.setattr(evaluation, "check_equal_across_ranks", lambda group, what, own: values.append(own))
    next(evaluate_checkpoint(plan, _NETWORK))
    return values[0]


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({"seed": 1}, ["weights"]),
        ({"precision": "bf16"}, ["precision", "tasks"]),
        ({"limit": 1}, ["validation images", "tasks"]),
        ({"probe": ["ncm"]}, ["tasks"]),
        ({"subset": ["1img@2"]}, ["labelled images", "tasks"]),
        ({"data": "changed"}, ["labelled images"]),
    ],
    ids=str,
)
def test_ranks_compare_what_they_are_about_to_measure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], differ: list[str]
) -> None:
    if options.get("data") == "changed":
        options = {"data": str(shutil.copytree(folder, tmp_path / "changed"))}
        for file in (tmp_path / "changed" / "train").rglob("*.png"):
            Image.new("RGB", (9, 9)).save(file)
    mine = _compared_values(_plan(folder, tmp_path / "mine"), monkeypatch)
    other = _compared_values(_plan(folder, tmp_path / "other", **options), monkeypatch)
    assert sorted(name for name in mine if mine[name] != other[name]) == sorted(differ)


def test_network_that_changes_while_it_is_used_gives_no_result(
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
    assert [again.status for again in evaluate_checkpoint(plan, _NETWORK)] == ["ok"]


@pytest.mark.parametrize("damage", ["metric", "name", "record", "predictions", "no predictions", "another's record"])
def test_damaged_result_is_measured_again(
    folder: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = _plan(folder, tmp_path, subset=["1img@1", "1img@2"])
    whole = list(evaluate_checkpoint(plan, _NETWORK))
    record = tmp_path / f"{whole[0].id}.json"
    written = (record.read_bytes(), record.with_suffix(".npz").read_bytes())
    top1 = f'"top1": {whole[0].metrics and whole[0].metrics.top1}'
    damages: dict[str, Callable[[], object]] = {
        "metric": lambda: record.write_text(record.read_text().replace(top1, '"top1": 0.95')),
        "name": lambda: record.write_text(record.read_text().replace('"draw": 1', '"draw": 2')),
        "record": lambda: record.write_text("{"),
        "predictions": lambda: record.with_suffix(".npz").write_bytes(written[1][:-9]),
        "no predictions": lambda: record.with_suffix(".npz").unlink(),
        "another's record": lambda: shutil.copy(tmp_path / f"{whole[1].id}.json", record),
    }
    damages[damage]()

    again = list(evaluate_checkpoint(plan, _NETWORK))

    assert [(one.id, one.metrics) for one in sorted(again, key=lambda one: one.split.draw)] == [
        (one.id, one.metrics) for one in whole
    ]
    assert read_result(record) in again
    assert record.with_suffix(".npz").read_bytes() == written[1]
    assert f"{record}: " in caplog.text


def test_record_of_a_later_version_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    plan = _plan(folder, tmp_path)
    (result,) = evaluate_checkpoint(plan, _NETWORK)
    record = tmp_path / f"{result.id}.json"
    record.write_text(json.dumps(add_seal(json.loads(record.read_text()) | {"schema": 99})))

    with pytest.raises(StoreError, match="schema 99"):
        list(evaluate_checkpoint(plan, _NETWORK))


def test_result_is_written_before_it_is_yielded(folder: Path, tmp_path: Path) -> None:
    result = next(evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK))
    assert (tmp_path / f"{result.id}.json").exists()


def test_only_taps_of_pending_tasks_are_extracted(folder: Path, tmp_path: Path) -> None:
    list(evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK))
    ready = prepare(_plan(folder, tmp_path, probe=["logistic", "ncm"]), _NETWORK)
    assert (set(ready.taps.values()), ready.taps_of(ready.frozen)) == ({"cls", "cls-norm"}, ("cls-norm",))


def test_only_images_of_pending_tasks_are_read(folder: Path, tmp_path: Path) -> None:
    list(evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK))
    plan = _plan(folder, tmp_path, subset=["1img@1", "1img@2"])
    assert set(pending_images(plan, prepare(plan, _NETWORK)).ids) == set(plan.subsets[1].image_ids)


def test_result_of_another_transform_is_refused(folder: Path, tmp_path: Path) -> None:
    plan = _plan(folder, tmp_path)
    (result,) = evaluate_checkpoint(plan, _NETWORK)
    transform = replace(result.features.transform, mean=(0.1, 0.2, 0.3))
    other = replace(result, features=replace(result.features, transform=transform), predictions=None)
    write_result(tmp_path, other, None)
    with pytest.raises(StoreError, match=r"same weights, read differently: transform.mean: \[0.1, 0.2, 0.3\] -> \[0.5"):
        prepare(plan, _NETWORK)


def test_another_spelling_of_the_same_network_shares_its_results(folder: Path, tmp_path: Path) -> None:
    torch.save(build_network(name_architecture(_NETWORK.partition(":")[2])).state_dict(), tmp_path / "vit.pth")
    given = {"data": folder, "out": tmp_path / "runs", "subsets": "1img@1", "probes": "ncm", "no_cache": True}
    given |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "device": "cpu"}
    (named,) = evaluate(str(tmp_path / "vit.pth"), arch=_NETWORK.partition(":")[2], **given)
    (recognised,) = evaluate(str(tmp_path / "vit.pth"), **given)
    assert (recognised, recognised.checkpoint.arch) == (named, _NETWORK.partition(":")[2])


def test_mean_and_std_by_hand_are_part_of_the_protocol(folder: Path, tmp_path: Path) -> None:
    (own,) = _evaluate(folder, tmp_path, subsets="1img@1", probes="ncm")
    (given,) = _evaluate(folder, tmp_path, subsets="1img@1", probes="ncm", mean=(0.1, 0.2, 0.3), std=[1, 1, 1])
    assert (own.protocol["by_hand"], given.protocol["by_hand"]) == (
        {},
        {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]},
    )
    assert (given.features.transform.mean, given.features.transform.mean_std_from) == (
        (0.1, 0.2, 0.3),
        "--mean and --std",
    )
    assert own.features.transform.mean_std_from == "timm's vit_tiny_patch16_224, the same for all of its tags"


def test_architecture_of_one_checkpoint_leaves_the_others_alone(folder: Path, tmp_path: Path) -> None:
    torch.save(build_network(name_architecture(_NETWORK.partition(":")[2])).state_dict(), tmp_path / "vit.pth")
    names = [str(tmp_path / "vit.pth"), "pixels"]
    archs = f"{names[0]}={_NETWORK.partition(':')[2]}"
    results = evaluate(
        names, data=folder, out=tmp_path / "runs", subsets="1img@1", probes="ncm", arch=archs, device="cpu"
    )
    assert [result.checkpoint.arch for result in results] == [_NETWORK.partition(":")[2], "pixels"]


def test_solver_that_did_not_converge_is_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_probe = evaluation.fit_probe

    def fit(*arguments: Any, **named: Any) -> FittedProbe:
        fitted = fit_probe(*arguments, **named)
        return replace(fitted, settings=tuple(replace(config, converged=False) for config in fitted.settings))

    monkeypatch.setattr(evaluation, "fit_probe", fit)
    assert [result.status for result in evaluate_checkpoint(_plan(folder, tmp_path), _NETWORK)] == ["not_converged"]


def test_checkpoint_is_read_as_requested(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, object] = {}

    def refuse(name: str, **named: object) -> None:
        options.update(named)
        raise CheckpointError("refused", where=name, hint="")

    monkeypatch.setattr(evaluation, "read_checkpoint", refuse)
    given = {"arch": ["a"], "checkpoint_key": "k", "allow_missing": ["m"], "seed": 3, "mean": [0.1, 0.2, 0.3]}
    with pytest.raises(CheckpointError, match="refused"):
        prepare(_plan(folder, tmp_path, **given), _NETWORK)
    assert options == {
        "arch": "a",
        "key": "k",
        "allow_missing": ("m",),
        "seed": 3,
        "mean": (0.1, 0.2, 0.3),
        "std": None,
    }


def test_a_refused_checkpoint_does_not_stop_the_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    problems: list[str] = []
    plan = _plan(folder, tmp_path, checkpoint=[str(tmp_path / "empty.pth"), _NETWORK])

    results, code, refused = evaluate_all(plan, on_problem=problems.append)

    assert ([result.status for result in results], code) == (["ok"], 20)
    assert [checkpoint.name for checkpoint in refused] == ["empty"]
    assert [problem.partition(":")[0] for problem in problems] == ["CheckpointError"]


def test_bf16_and_fp16_are_comparable(folder: Path, tmp_path: Path) -> None:
    list(evaluate_checkpoint(_plan(folder, tmp_path, precision="bf16"), _NETWORK))
    (known,) = prepare(_plan(folder, tmp_path, precision="fp16"), _NETWORK).known
    assert known.features.precision == "bf16"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_unreadable_image_is_skipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    for name in ("a/0.png", "b/3.png", "b/4.png"):
        (damaged / "val" / name).write_bytes(b"")
    used = set()
    load_pixels = plan_module.load_pixels

    def load(*arguments: Any, **named: Any) -> Iterator[PixelBatch]:
        used.add(named["workers"])
        return load_pixels(*arguments, **named)

    monkeypatch.setattr(plan_module, "load_pixels", load)
    plan = _plan(damaged, tmp_path / "runs", on_bad_image="skip", workers=str(workers))
    assert (plan.skipped_val, used) == (("a/0.png", "b/3.png", "b/4.png"), {workers})


def test_hashes_of_both_splits_are_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msn_eval.data.hashing._SETTLED_NS", 0)
    _plan(folder, tmp_path, no_cache=False, cache=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "hashes").iterdir())) == 2


def test_subset_with_fewer_images_than_every_k_is_named_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _plan(folder, tmp_path / "runs", subset=["1img", "full"], probe=["knn"])

    assert [message for message in caplog.messages if "every k" in message] == [
        "knn measures nothing on 1img: every k is above its 4 labelled images; give a smaller one, such as --k 1,5"
    ]


@pytest.mark.parametrize(
    ("count", "warnings"),
    [
        (
            1,
            [
                "val: ignored 1 file that is not an image by its name",
                "full: 1 unreadable image skipped: val/b/0.png",
                "1 validation image is also among the labelled training images, byte for byte",
            ],
        ),
        (
            2,
            [
                "val: ignored 2 files that are not images by their names",
                "full: 2 unreadable images skipped: val/b/0.png, val/b/1.png",
                "2 validation images are also among the labelled training images, byte for byte",
            ],
        ),
    ],
)
def test_warnings_agree_with_the_number_of_images(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, warnings: list[str]
) -> None:
    odd = shutil.copytree(folder, tmp_path / "odd")
    for number in range(count):
        (odd / "val" / f"{number}.txt").touch()
        (odd / "val" / "b" / f"{number}.png").write_bytes(b"")
        shutil.copy(odd / "train" / "a" / f"{number}.png", odd / "val" / "a" / f"copy{number}.png")

    with caplog.at_level(logging.INFO, logger="msn_eval"):
        _plan(odd, tmp_path / "runs", subset=["full"], on_bad_image="skip")

    assert [message for message in caplog.messages if "the file is empty" not in message] == warnings


def test_labelled_images_among_the_validation_images_are_counted_draw_by_draw(folder: Path, tmp_path: Path) -> None:
    leaky = shutil.copytree(folder, tmp_path / "leaky")
    first, second, third = (subset.image_ids for subset in _plan(leaky, tmp_path, subset=["2imgs"]).subsets)
    shared = next(image_id for image_id in first if image_id not in second)
    (leaky / "val" / "a" / "copy.png").write_bytes((leaky / "train" / shared).read_bytes())

    results = _evaluate(leaky, tmp_path / "out")

    overlaps = {result.split.draw: result.split.overlap for result in results}
    assert overlaps == {1: 1, 2: 0, 3: int(shared in third)}


def test_files_of_one_name_have_their_folders_in_the_log(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arch = _NETWORK.removeprefix("random:")
    files = [tmp_path / name / "best.pth" for name in "ab"]
    weights = build_network(name_architecture(arch)).state_dict()
    for scale, file in enumerate(files, start=1):
        file.parent.mkdir()
        torch.save({name: scale * tensor for name, tensor in weights.items()}, file)

    with caplog.at_level(logging.INFO, logger="msn_eval"):
        results = evaluate(
            list(map(str, files)),
            data=folder,
            out=tmp_path / "runs",
            arch=arch,
            subsets="1img@1",
            probes="ncm",
            device="cpu",
        )

    messages = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0] for text in messages if "features of" in text] == ["a/best", "b/best"]
    assert [result.checkpoint.name for result in results] == ["best", "best"]


def test_collapsed_features_are_reported_and_scored_at_chance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = _write_images(tmp_path / "black", train=2, val=5)
    for file in data.rglob("*.png"):
        Image.new("RGB", (8, 8)).save(file)
    options = {"subsets": "2imgs@1", "probes": ["logistic", "ridge", "ncm"], "no_cache": True}

    results = _evaluate_pixels(data, tmp_path / "runs", **options)

    assert [result.metrics.top1 for result in results if result.metrics] == [0.25] * 3
    messages = [record.getMessage() for record in caplog.records if "collapsed representation" in record.getMessage()]
    assert [message.partition(": collapsed")[0] for message in messages] == [
        f"pixels: tap pixels, {split} images" for split in ("labelled", "validation")
    ]
    assert {(result.features.degenerate or "").partition(":")[0] for result in results} == {"labelled images"}
    assert _evaluate_pixels(data, tmp_path / "runs", **options) == results


def test_validation_labels_change_neither_the_chosen_layer_nor_a_prediction(folder: Path, tmp_path: Path) -> None:
    revealing = tmp_path / "revealing"
    for split, names in (("train", "abcd"), ("val", "bcda")):  # classes of validation images permuted
        for name, other in zip("abcd", names, strict=True):
            shutil.copytree(folder / split / name, revealing / split / other)
    recipe = {"lr_first": 0.01, "lr_last": 100.0, "lrs": 5, "epochs": 20}

    (result,) = _evaluate_pixels(folder, tmp_path / "a", linear=recipe, no_cache=True)
    (other,) = _evaluate_pixels(revealing, tmp_path / "b", linear=recipe, no_cache=True)

    assert result.probe.chosen is not None
    assert other.probe == result.probe
    first = read_predictions(tmp_path / "a" / str(result.predictions))
    second = read_predictions(tmp_path / "b" / str(other.predictions))
    assert (np.roll(second.prediction, -20) == first.prediction).all()
    assert (np.roll(second.label, -20) != first.label).all()


def test_one_image_per_class_fails_for_a_grid_and_other_subsets_are_measured(folder: Path, tmp_path: Path) -> None:
    results = _evaluate_pixels(
        folder, tmp_path, subsets=["1img@1", "2imgs@1"], no_cache=True, linear={"lrs": 2, "epochs": 5}
    )

    assert [(result.split.subset, result.status) for result in results] == [("1img", "failed"), ("2imgs", "ok")]
    assert "one per class" in str(results[0].error)


def test_features_that_do_not_fit_into_memory_give_the_same_linear_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measure(name: str) -> Result:
        recipe = {"lrs": 3, "epochs": 5, "batch_size": 8}
        cache = tmp_path / f"{name} cache"
        (result,) = _evaluate_pixels(folder, tmp_path / name, subsets="full", cache=cache, linear=recipe)
        return result

    in_memory = measure("memory")
    monkeypatch.setattr(feature_cache, "available_bytes", lambda: 1)
    with caplog.at_level(logging.INFO):
        streamed = measure("disk")

    assert caplog.text.count("mapped from the disk") == 1  # the labelled rows only: all others are scored at once
    assert "32 rows of 3072 features" in caplog.text
    assert (streamed.metrics, streamed.probe) == (in_memory.metrics, in_memory.probe)


def test_every_draw_scores_with_the_tap_that_it_chose(tmp_path: Path) -> None:
    def measure(*taps: str) -> dict[int, Result]:
        recipe = {"lrs": 1, "weight_decays": 1, "epochs": 2, "taps": list(taps)}
        results = evaluate(
            "demo", data="digits", subsets="5imgs", probes="linear", linear=recipe, device="cpu", out=tmp_path / "runs",
            cache=tmp_path / "cache",
        )  # fmt: skip
        return {result.split.draw: result for result in results}

    several, alone = measure("mean", "cls"), {tap: measure(tap) for tap in ("cls", "mean")}

    chosen = {draw: str((result.probe.chosen or {})["tap"]) for draw, result in several.items()}
    assert set(chosen.values()) == {"cls", "mean"}
    assert all(result.metrics == alone[chosen[draw]][draw].metrics for draw, result in several.items())
    assert alone["cls"][3].metrics != alone["mean"][3].metrics
    protocols = {result.protocol_id for result in several.values()}
    assert protocols.isdisjoint(result.protocol_id for result in alone["mean"].values())
    taps = {(result.probe.params["taps"], result.features.tap, result.protocol["tap"]) for result in several.values()}
    assert taps == {("cls,mean",) * 3}


def _choose_tap(folder: Path, tmp_path: Path, taps: list[str]) -> list[Result]:
    recipe = {"taps": taps, "lrs": 2, "lr_last": 1.0, "weight_decays": 1, "epochs": 3}
    options = {"subsets": "5imgs@1", "probes": "linear", "seed": 3}
    return _evaluate(folder, tmp_path / "runs", linear=recipe, no_cache=False, cache=tmp_path / "cache", **options)


def test_taps_to_choose_from_share_one_pass_and_a_rerun_computes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    extract_features = evaluation.extract_features

    def extract(*arguments: Any, **named: Any) -> Extraction:
        passes.append(named["taps"])
        return extract_features(*arguments, **named)

    monkeypatch.setattr(evaluation, "extract_features", extract)
    (first,) = _choose_tap(folder, tmp_path, ["cls", "mean"])
    (again,) = _choose_tap(folder, tmp_path, ["mean", "cls", "mean"])

    assert passes == [("cls", "mean")] * 2  # labelled and validation images
    assert first == again


def test_a_network_without_one_of_the_taps_to_choose_from_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        _choose_tap(folder, tmp_path, ["cls", "cls4"])

    assert str(caught.value).startswith(f"linear.taps cls4: {_NETWORK} (")
    assert str(caught.value).endswith("has no tap of this name\nIt has: cls, cls-norm, mean.")


@pytest.mark.parametrize("name", ["knnn", "k-nn"])
def test_an_unknown_probe_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"No probe is called '{name}'.* Did you mean knn"):
        make_plan(EvaluationConfig(checkpoint=[_NETWORK], data=str(folder), probe=[name], out=str(tmp_path)))


_PLUGIN = """
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig


@dataclass(frozen=True, kw_only=True)
class Constant(FeatureProbe):
    name = "constant"
    version = 3

    @property
    def taps(self):
        return ("mean",)

    def configs(self, n):
        return ({"label": 0}, {"label": 1})

    def fit(self, train, device, *, workers=None, other_taps=()):
        def scores(values):
            for label in (0, 1):
                yield torch.eye(train.n_classes, dtype=torch.float64)[label].repeat(len(values), 1)

        return FittedProbe(settings=tuple(ProbeConfig(params=params) for params in self.configs(0)), scores=scores)


def configure(config, subset):
    yield Constant()
"""


def test_a_probe_of_an_entry_point_is_listed_run_and_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from msn_eval.cli import main

    (tmp_path / "constant_probe.py").write_text(_PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    point = SimpleNamespace(
        name="constant", value="constant_probe:configure", dist=SimpleNamespace(name="toy-probe", version="1.2")
    )
    monkeypatch.setattr("msn_eval.registry.entry_points", lambda group: [point] if group.endswith("probes") else [])

    results = _evaluate(folder, tmp_path / "runs", probes=["constant", "ncm"], subsets="1img@1")

    assert [(result.probe.name, result.features.tap) for result in results] == [
        ("constant", "mean"), ("constant", "mean"), ("ncm", "cls-norm"),
    ]  # fmt: skip
    assert [result.metrics.top1 for result in results[:2] if result.metrics] == [0.25, 0.25]
    assert [result.protocol.get("plugins") for result in results] == [{"probe": "toy-probe 1.2"}] * 2 + [None]
    assert set(read_results(str(tmp_path / "runs"))["probe.name"]) == {"constant", "ncm"}
    assert main(["ls", "probes"]) == 0
    assert "constant\tplug-in of toy-probe 1.2" in capsys.readouterr().out


def test_a_data_set_of_a_plugin_is_part_of_the_protocol(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(plan_module.read_dataset(str(folder)), distribution="toy-data 0.3")
    monkeypatch.setattr(plan_module, "read_dataset", lambda name, **options: data)

    (task,) = _plan(folder, tmp_path).tasks

    assert task.protocol["plugins"] == {"data": "toy-data 0.3"}
