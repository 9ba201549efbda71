"""Records: what is written reads back, and damaged records are refused."""

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision

import msn_eval
from msn_eval.errors import DamagedRecordError, StoreError
from msn_eval.files.json_records import add_seal
from msn_eval.results import record as environment
from msn_eval.results.folder import list_results
from msn_eval.results.record import (
    SCHEMA,
    EnvironmentInfo,
    Result,
    describe_environment,
    encode_result,
    read_predictions,
    read_result,
    result_id,
    write_result,
)

_RELEASED = Path(__file__).parents[2] / "golden" / "records"


@pytest.fixture
def result(digits_runs: Path) -> Result:
    return list_results([digits_runs])[0]


def test_written_result_reads_back_equal(result: Result, tmp_path: Path) -> None:
    write_result(tmp_path, result, None)

    assert read_result(tmp_path / f"{result.id}.json") == result


def test_distribution_is_written_only_where_there_is_one(result: Result, tmp_path: Path) -> None:
    plugged = replace(result, checkpoint=replace(result.checkpoint, distribution="toy-encoders 1.2"))
    write_result(tmp_path, plugged, None)

    assert read_result(tmp_path / f"{result.id}.json") == plugged
    assert "distribution" not in encode_result(result)["checkpoint"]


def test_metrics_follow_from_the_stored_predictions_of_every_image_in_order(digits_runs: Path) -> None:
    for result in list_results([digits_runs]):
        stored = read_predictions(digits_runs / str(result.predictions))
        assert stored.metrics == result.metrics
        assert list(stored.image) == sorted(stored.image)
        assert np.array_equal(stored.rank_of_label == 1, stored.prediction == stored.label)


def test_record_with_nan_is_not_written(result: Result, tmp_path: Path) -> None:
    assert result.metrics is not None
    broken = replace(result, metrics=replace(result.metrics, top1=float("nan")))

    with pytest.raises(ValueError, match="Out of range float"):
        write_result(tmp_path, broken, None)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("3", "schema 3; this version of msn-eval reads 1 to 2"),
        ("0", "schema 0; this version of msn-eval reads 1 to 2"),
        ("true", "schema True"),
        ('"2"', "schema '2'"),
        ("null", "schema None"),
    ],
)
def test_sealed_record_of_another_schema_is_refused_and_not_called_damaged(
    result: Result, tmp_path: Path, schema: str, message: str
) -> None:
    path = _rewritten(result, tmp_path, '"schema": 2', f'"schema": {schema}')

    with pytest.raises(StoreError) as refusal:
        read_result(path)

    assert str(path) in str(refusal.value)
    assert message in str(refusal.value)
    assert "Update msn-eval." in str(refusal.value)
    assert not isinstance(refusal.value, DamagedRecordError)


def _rewritten(result: Result, folder: Path, before: str, after: str, *, sealed: bool = True) -> Path:
    """Write a record with a change of its text, sealed after the change or before."""
    write_result(folder, result, None)
    path = folder / f"{result.id}.json"
    text = path.read_text()
    assert before in text
    text = text.replace(before, after)
    path.write_text(json.dumps(add_seal(json.loads(text))) if sealed else text)
    return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"top1": 0', '"top1": 0.9'),
        ('"arch": "pixels"', '"arch": "vit"'),
        ("0.229", "0.5"),
        ('"resize": 37', '"resize": 32'),
        ('"schema": 2', '"schema": 1'),
        ('"schema": 2', '"schema": 3'),
        ('"subset": "1img"', '"subset": "2imgs"'),
        ('"seal": "', '"seal": "0'),
    ],
)
def test_any_change_of_a_sealed_record_is_damage(result: Result, tmp_path: Path, before: str, after: str) -> None:
    path = _rewritten(result, tmp_path, before, after, sealed=False)

    with pytest.raises(DamagedRecordError, match=re.escape(str(path))):
        read_result(path)


def test_predictions_with_other_bytes_are_damage(digits_runs: Path, result: Result, tmp_path: Path) -> None:
    stored = read_predictions(digits_runs / str(result.predictions))
    write_result(tmp_path, result, stored)
    np.savez(tmp_path / str(result.predictions), **vars(stored))  # the same values, not compressed

    with pytest.raises(DamagedRecordError, match=f"{result.id}.npz: not the predictions that the record was made from"):
        read_result(tmp_path / f"{result.id}.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["metrics"].update(top1=0.63), "metrics.top1: recorded 0.63, computed from the predictions 0.62"),
        (lambda record: record.update(predictions="../secret.npz"), "which is not the file of its id"),
    ],
)  # fmt: skip
def test_metrics_of_schema_1_are_recomputed_when_read(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = _copy_released(tmp_path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))

    with pytest.raises(DamagedRecordError, match=re.escape(message)):
        read_result(path)


def test_schema_1_without_predictions_is_not_believed(tmp_path: Path) -> None:
    path = _copy_released(tmp_path)
    path.with_suffix(".npz").unlink()

    with pytest.raises(DamagedRecordError, match="not readable predictions: No such file"):
        read_result(path)


def _copy_released(folder: Path) -> Path:
    for suffix in (".npz", ".json"):
        copy = shutil.copy(_RELEASED / "schema-1" / f"b39361b67149d6c5{suffix}", folder)
    return Path(copy)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"schema": 2,', "", "it states no schema"),
        ('"draw": ', '"draw": "1", "was": ', "split.draw is of the wrong type"),
        ('"draw": ', '"drawn": ', "split.drawn is not a field of this schema"),
        ('"classes": 10,', "", "data.classes is missing"),
        ('"top5": ', '"top5": -0.5, "was": ', "metrics.was is not a field"),
        ('"status": "ok"', '"status": "fine"', "status is of the wrong type"),
        ('"classes": 10', '"classes": true', "data.classes is of the wrong type: true"),
        ('"name": "digits"', '"name": null', "data.name is of the wrong type: null"),
        ('"limit": null', '"limit": 7', "protocol_id does not match the protocol"),
    ],
)
def test_field_of_the_wrong_kind_is_named(
    result: Result, tmp_path: Path, before: str, after: str, message: str
) -> None:
    path = _rewritten(result, tmp_path, before, after)

    with pytest.raises(DamagedRecordError, match=message):
        read_result(path)


def test_nan_in_a_record_is_named(result: Result, tmp_path: Path) -> None:
    path = _rewritten(result, tmp_path, '"top1": ', '"top1": NaN, "was": ', sealed=False)

    with pytest.raises(DamagedRecordError, match="NaN is not a JSON number"):
        read_result(path)


@pytest.mark.parametrize("change", [{"top1": 1.5}, {"top5": 0.0}, {"n": 0}, {"top1_ci95": (0.9, 0.1)}])
def test_metrics_outside_their_range_are_refused(
    result: Result, tmp_path: Path, change: dict[str, float | tuple[float, float]]
) -> None:
    assert result.metrics is not None
    write_result(tmp_path, replace(result, metrics=replace(result.metrics, **change)), None)  # type: ignore[arg-type]

    with pytest.raises(StoreError, match="its metrics are not accuracies"):
        read_result(tmp_path / f"{result.id}.json")


@pytest.mark.parametrize(
    "change",
    [{"nll": -0.1}, {"brier": 2.1}, {"brier": None}, {"ece": 1.1}, {"ece": None}],
)
def test_calibration_outside_its_range_is_refused(
    digits_runs: Path, tmp_path: Path, change: dict[str, float | None]
) -> None:
    result = next(result for result in list_results([digits_runs]) if result.probe.name == "logistic")
    content = encode_result(result)
    content["metrics"] |= change
    (tmp_path / f"{result.id}.json").write_text(json.dumps(add_seal(content)))

    with pytest.raises(DamagedRecordError, match="its metrics are not a calibration"):
        read_result(tmp_path / f"{result.id}.json")


def test_calibration_is_recorded_where_the_probe_has_probabilities_and_absent_elsewhere(digits_runs: Path) -> None:
    recorded = {
        path.stem: (content["probe"]["name"], content["metrics"].keys() >= {"nll", "brier", "ece"})
        for path in digits_runs.glob("*.json")
        if (content := json.loads(path.read_text()))["metrics"]
    }

    assert {name for name, _ in recorded.values()} == {"logistic", "knn", "ncm"}
    assert all(is_recorded == (name != "ncm") for name, is_recorded in recorded.values())


def test_unset_likelihood_of_a_calibrated_record_is_written_as_null(result: Result) -> None:
    assert result.metrics is not None
    calibrated = replace(result, metrics=replace(result.metrics, nll=None, brier=0.5, ece=0.1))

    assert encode_result(calibrated)["metrics"]["nll"] is None
    assert "nll" not in encode_result(replace(result, metrics=replace(result.metrics, nll=None, brier=None, ece=None)))


def test_records_of_every_released_schema_keep_their_fields() -> None:
    assert [path.name for path in sorted(_RELEASED.iterdir())] == [f"schema-{n}" for n in range(1, SCHEMA + 1)]
    for path in _RELEASED.glob("*/*.json"):
        written = json.loads(path.read_text())
        read = json.loads(json.dumps(encode_result(read_result(path))))
        assert written.pop("schema") <= read.pop("schema") == SCHEMA
        written["checkpoint"].setdefault("allow_missing", [])  # what 0.1.0 did not record at first
        written["split"].setdefault("overlap", None)
        written["probe"].setdefault("chosen", None)
        written["features"].setdefault("degenerate", None)
        if "seal" not in written:
            digest = None if written["predictions"] is None else hash_file(path.with_suffix(".npz"))
            written |= {"predictions_sha256": digest, "seal": read["seal"]}
        assert read == written


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("schema", range(1, SCHEMA + 1))
def test_records_of_every_released_schema_keep_their_numbers(schema: int) -> None:
    numbers = {
        result.id: (result.probe.name, result.split.subset, result.split.draw, result.metrics and result.metrics.top1)
        for result in list_results([_RELEASED / f"schema-{schema}"])
    }

    assert numbers == {
        "25349e1768a0730b": ("ncm", "5imgs", 1, 0.84),
        "47ee276da93c9e8e": ("knn", "1img", 1, 0.61),
        "83169b93ab604759": ("ncm", "1img", 1, None),
        "9e8f2071fa9c582d": ("logistic", "1img", 2, 0.76),
        "b39361b67149d6c5": ("logistic", "1img", 1, 0.62),
    }


def test_damaged_prediction_file_is_named(digits_runs: Path, tmp_path: Path) -> None:
    content = bytearray(next(digits_runs.glob("*.npz")).read_bytes())
    content[200] ^= 1
    path = tmp_path / "flipped.npz"
    path.write_bytes(content)

    with pytest.raises(StoreError, match=r"flipped\.npz"):
        read_predictions(path)


def test_result_id_depends_on_weights_key_protocol_and_draw() -> None:
    base = {"weights_sha256": "w", "key": None, "protocol_id": "p", "draw": 1}
    others = [{"weights_sha256": "x"}, {"key": "k"}, {"protocol_id": "q"}, {"draw": 2}]

    ids = {result_id(**{**base, **other}) for other in [{}, *others]}  # type: ignore[arg-type]

    assert len(ids) == 5


def describe() -> EnvironmentInfo:
    return describe_environment(torch.device("cpu"), batch_size=64, seed=3)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A Tester", "-c", "user.email=tester@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def package_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Return a function that makes the package appear to run from a folder, with an empty cache."""

    def run_from(folder: Path) -> None:
        monkeypatch.setattr(environment, "__file__", str(folder / "msn_eval" / "results" / "environment.py"))
        environment._read_commit.cache_clear()

    yield run_from
    environment._read_commit.cache_clear()


@pytest.fixture
def checkout(tmp_path: Path, package_in: Callable[[Path], None]) -> Path:
    """Return a git checkout with one commit that the package appears to run from."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "README.md").write_text("one\n")
    git(tmp_path, "add", "README.md")
    git(tmp_path, "commit", "--quiet", "--message", "First")
    package_in(tmp_path)
    return tmp_path


def test_versions_are_those_that_run() -> None:
    info = describe()
    assert (info.package, info.python) == (msn_eval.__version__, platform.python_version())
    assert (info.torch, info.device, info.batch_size, info.seed) == (torch.__version__, "cpu", 64, 3)
    assert (info.timm, info.numpy, info.os) == (timm.__version__, np.__version__, platform.platform())
    assert str(info.torchvision).partition("+")[0] == torchvision.__version__.partition("+")[0]


def test_versions_are_read_without_importing_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)

    describe()

    assert "timm" not in sys.modules


@pytest.mark.parametrize(
    ("content", "expected"),
    [("processor\t: 0\nmodel name\t: EPYC 9999 \n", "EPYC 9999"), ("CPU part\t: 0xd40\n", "riscv"), (None, "riscv")],
    ids=["x86", "arm", "no file"],
)
def test_processor_is_the_model_that_the_system_names_or_else_its_architecture(
    content: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, **_: object) -> str:
        if content is None:
            raise FileNotFoundError(path)
        return content

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv")

    assert environment._read_processor.__wrapped__() == expected


def test_version_that_an_older_record_lacks_is_not_written(result: Result) -> None:
    older = replace(result, environment=replace(result.environment, timm=None, processor=None))

    assert encode_result(result)["environment"].keys() - encode_result(older)["environment"].keys() == {
        "timm",
        "processor",
    }


@pytest.mark.parametrize(("changed", "mark"), [("runs.json", ""), ("README.md", "+")], ids=["untracked", "tracked"])
def test_checkout_states_its_commit_with_a_plus_if_tracked_files_differ(
    changed: str, mark: str, checkout: Path
) -> None:
    (checkout / changed).write_text("two\n")

    assert describe().git == git(checkout, "rev-parse", "HEAD") + mark


def test_installed_package_states_no_commit(tmp_path: Path, package_in: Callable[[Path], None]) -> None:
    package_in(tmp_path)
    assert describe().git is None


def test_machine_without_git_states_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert describe().git is None


def test_checkout_without_a_commit_states_none(tmp_path: Path, package_in: Callable[[Path], None]) -> None:
    git(tmp_path, "init", "--quiet")
    package_in(tmp_path)
    assert describe().git is None
