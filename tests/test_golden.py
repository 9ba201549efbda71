"""Ids and numbers that may only move in a commit that says why: everything later is compared through them."""

import hashlib
import json
from pathlib import Path

import pytest

from msn_eval import evaluate
from msn_eval.config.recipes import Finetune
from msn_eval.probes import Probe
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.linear import Linear
from msn_eval.probes.linear_augmented import LinearAugmented
from msn_eval.probes.logistic import Logistic, LogisticAutoLambda
from msn_eval.probes.ncm import NearestClassMean
from msn_eval.probes.ridge import Ridge
from msn_eval.results.record import Result, protocol_id

_GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return evaluate(
        ["pixels"],
        data="digits",
        subsets=["low-shot"],
        probes=["logistic", "knn", "ncm"],
        out=tmp_path_factory.mktemp("golden"),
        device="cpu",
        no_cache=True,
    )


def test_protocols_and_their_ids_are_those_of_record(results: list[Result]) -> None:
    expected = {entry["protocol_id"]: entry["protocol"] for entry in _read("digits_protocols.json")}

    assert {result.protocol_id: result.protocol for result in results} == expected


def test_a_protocol_id_is_the_hash_of_its_canonical_json() -> None:
    for entry in _read("digits_protocols.json"):
        text = json.dumps(entry["protocol"], sort_keys=True, separators=(",", ":"))
        assert entry["protocol_id"] == hashlib.sha256(text.encode()).hexdigest()[:16] == protocol_id(entry["protocol"])


@pytest.mark.parametrize(
    ("probe", "name", "tap"),
    [
        (Logistic, "logistic", "cls"),
        (LogisticAutoLambda, "logistic", "cls"),
        (NearestNeighbours, "knn", "cls-norm"),
        (Linear, "linear", "cls"),
        (LinearAugmented, "linear-augmented", "cls"),
        (Ridge, "ridge", "cls"),
        (NearestClassMean, "ncm", "cls-norm"),
        (Finetune, "finetune", "cls-norm"),
    ],
)
def test_every_probe_has_the_name_version_and_tap_of_record(probe: type[Probe], name: str, tap: str) -> None:
    assert (probe.name, probe.version, probe.tap) == (name, 1, tap)


def test_raw_pixels_on_the_digits_score_what_they_always_did(results: list[Result]) -> None:
    found = [
        {
            "id": result.id,
            "probe": result.probe.name,
            "params": dict(result.probe.params),
            "subset": result.split.subset,
            "draw": result.split.draw,
            "split_sha256": result.split.sha256,
            "correct": round(result.metrics.top1 * result.metrics.n) if result.metrics else None,
        }
        for result in results
    ]

    assert found == _read("digits_pixels.json")


def _read(name: str) -> list[dict[str, object]]:
    content: list[dict[str, object]] = json.loads((_GOLDEN / name).read_text())
    return content
