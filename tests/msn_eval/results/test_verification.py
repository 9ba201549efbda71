"""Verification: valid records pass, and any change of one is reported with its file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msn_eval.cli import main
from msn_eval.results.record import protocol_id, result_id
from msn_eval.results.verification import verify_results

_VALID = Path(__file__).parents[2] / "golden" / "records" / "schema-1"
_SEALED = _VALID.with_name("schema-2")
Record = dict[str, Any]
Arrays = dict[str, Any]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(_VALID, tmp_path / "runs"))


@pytest.fixture
def record(runs: Path) -> Path:
    """Return the record of a logistic fit."""
    return next(path for path in sorted(runs.glob("*.json")) if '"lambda"' in path.read_text())


def _edit(path: Path, change: Callable[[Record], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _edit_arrays(path: Path, change: Callable[[Arrays], object]) -> None:
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = dict(stored)
    change(arrays)
    np.savez_compressed(path.with_suffix(".npz"), **arrays)


def _faults(folder: Path) -> list[str]:
    return [f"{Path(fault.where).name}: {fault.what}" for fault in verify_results([folder]).faults]


def test_valid_records_are_counted_and_pass(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["verify", str(runs)])

    assert code == 0
    assert capsys.readouterr().out == "5 records: ids, hashes and metrics follow from 800 stored predictions\n"


def test_json_has_counts_and_every_fault(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = min(runs.glob("*.json"))
    record.write_text("{")

    code = main(["verify", "--json", str(runs)])

    outcome = json.loads(capsys.readouterr().out)
    assert (code, outcome["ok"], outcome["records"]) == (22, False, 5)
    assert [fault["where"] for fault in outcome["faults"]] == [str(record)]


def test_records_of_an_evaluation_are_valid(digits_runs: Path) -> None:
    outcome = verify_results([digits_runs])

    assert (outcome.faults, outcome.records) == ((), len(list(digits_runs.glob("*.json"))))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("metrics", "top1"), 0.5, "metrics.top1: recorded 0.5, computed from the predictions 0."),
        (("metrics", "top5"), 1.0, "metrics.top5: recorded 1.0"),
        (("metrics", "top1_ci95"), [0.1, 0.9], "metrics.top1_ci95: recorded (0.1, 0.9)"),
        (("metrics", "n"), 201, "metrics.n: recorded 201, computed from the predictions 200"),
        (("data", "val_images"), 201, "data.val_images: recorded 201, stored predictions of 200 images"),
        (("data", "classes"), 9, "label 9 of '9/0100.png' is outside 0 to 8"),
        (("data", "skipped"), 1, "data.skipped: the record states 1, its protocol None"),
        (("data", "class_map_sha256"), "0" * 64, "data.class_map_sha256: does not match the class names"),
        (("data", "sha256"), "0" * 64, "data: the record states {'sha256': '0000"),
        (("split", "draw"), 9, "computed from weights, key, protocol and draw"),
        (("split", "subset"), "2imgs", "split.subset: the record states '2imgs', its protocol {'name': '1img'"),
        (("split", "sha256"), "short", "split.sha256: 'short' is not a SHA-256"),
        (("checkpoint", "weights_sha256"), "0" * 64, "computed from weights, key, protocol and draw"),
        (("checkpoint", "key"), "student", "computed from weights, key, protocol and draw"),
        (("features", "precision"), "bf16", "precision: the record states reduced, its protocol exact"),
        (("probe", "params"), {"lambda": 1.0}, "its protocol {'name': 'logistic', 'version': 1, 'params': {'lambda': 0.0025}}"),
        (("probe", "certificate"), 0.5, "probe.certificate: 0.5, although probe.converged is True"),
        (("status",), "not_converged", "status: not_converged, although probe.converged is True"),
        (("predictions",), None, "predictions: none are named"),
        (("predictions",), "../../secret.npz", "is not the file of its id"),
        (("protocol", "limit"), 21, "protocol_id does not match the protocol"),
    ],
)  # fmt: skip
def test_changed_field_is_reported(
    runs: Path, record: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    def change(content: Record) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    _edit(record, change)

    assert any(fault.startswith(record.name) and message in fault for fault in _faults(runs)), _faults(runs)


def _swap(arrays: Arrays) -> None:
    arrays["image"][[0, 1]] = arrays["image"][[1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(label=a["label"][:-1]), "arrays of different lengths"),
        (lambda a: a.update(label=a["label"].astype(float)), "arrays of unexpected types"),
        (lambda a: a.update({name: array[:0] for name, array in a.items()}), "no images"),
        (lambda a: a["prediction"].__setitem__(0, 10), "prediction 10 of '0/0100.png' is outside 0 to 9"),
        (lambda a: a["rank_of_label"].__setitem__(a["rank_of_label"].argmax(), 11), "is outside 1 to 10"),
        (lambda a: a["rank_of_label"].sort(), "contradict each other"),
        (lambda a: a["image"].__setitem__(1, a["image"][0]), "an image occurs twice"),
        (_swap, "of the same data.sha256"),
        (lambda a: a.pop("rank_of_label"), "rank_of_label"),
    ],
)
def test_changed_predictions_are_reported(
    runs: Path, record: Path, change: Callable[[Arrays], object], message: str
) -> None:
    other = max(runs.glob("*.npz"))  # not the first, by which the others are measured
    _edit_arrays(other, change)

    assert any(fault.startswith(other.stem) and message in fault for fault in _faults(runs)), _faults(runs)


def test_missing_predictions_are_reported(runs: Path, record: Path) -> None:
    record.with_suffix(".npz").unlink()

    (fault,) = _faults(runs)

    assert fault.startswith(f"{record.name}: {record.stem}.npz: not readable predictions: ")


def test_different_labelled_images_under_the_same_protocol_and_draw_are_reported(runs: Path, record: Path) -> None:
    content = json.loads(record.read_text())
    content["checkpoint"]["weights_sha256"] = content["split"]["sha256"] = "0" * 64
    content["id"] = result_id(
        weights_sha256="0" * 64, key=None, protocol_id=content["protocol_id"], draw=content["split"]["draw"]
    )
    content["predictions"] = f"{content['id']}.npz"
    (runs / f"{content['id']}.json").write_text(json.dumps(content))
    shutil.copy(record.with_suffix(".npz"), runs / content["predictions"])

    (fault,) = _faults(runs)

    assert "split.sha256: different labelled images than in" in fault


def test_consistent_change_of_the_protocol_contradicts_the_id(runs: Path, record: Path) -> None:
    def change(content: Record) -> None:
        content["protocol"]["limit"] = None
        content["protocol_id"] = protocol_id(content["protocol"])

    _edit(record, change)

    assert any("id: recorded" in fault for fault in _faults(runs))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("checkpoint", "arch", "vit_small_patch16_224"),
        ("split", "sha256", "0" * 64),
        ("probe", "certificate", 1e-9),
        ("features", "transform", {"resize": 32, "crop": 32, "interpolation": "bilinear", "mean": [0.5], "std": [0.5]}),
        ("timing_s", "total", 0.5),
    ],
)
def test_any_changed_field_of_a_sealed_record_is_reported(
    tmp_path: Path, section: str, name: str, value: object
) -> None:
    runs = Path(shutil.copytree(_SEALED, tmp_path / "runs"))
    record = runs / "b39361b67149d6c5.json"
    _edit(record, lambda content: content[section].__setitem__(name, value))

    assert _faults(runs) == [f"{record.name}: not a readable result: its seal does not match: it was edited or damaged"]


def test_every_fault_of_every_record_is_listed_and_ends_with_22(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, *_ = sorted(runs.glob("*.json"))
    first.write_text("{")
    _edit(second, lambda content: content.update(schema=3))
    _edit(third, lambda content: content["split"].update(sha256="never"))

    code = main(["verify", str(runs)])

    shown = capsys.readouterr().err
    assert code == 22
    assert "3 faults in 3 of 5 records" in shown
    assert all(path.name in shown for path in (first, second, third)), shown
    assert "it has no seal" in shown


def test_record_in_two_folders_is_verified_in_both(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs, tmp_path / "copy"))
    changed = next(path for path in sorted(copy.glob("*.json")) if '"lambda"' in path.read_text())
    _edit(changed, lambda content: content["metrics"].update(top5=1.0))

    faults = verify_results([runs, copy]).faults

    assert [fault.where for fault in faults] == [str(changed)]


def test_predictions_without_a_record_are_mentioned_and_not_a_fault(
    runs: Path, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record.unlink()

    code = main(["verify", str(runs)])

    assert code == 0
    assert "1 prediction file without a record" in capsys.readouterr().out
