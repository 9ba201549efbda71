"""Ids and numbers that may change only in a commit that says why: all later results are compared through them."""

import hashlib
import json
from pathlib import Path

import pytest

from msn_eval import evaluate
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.evaluation.plan import configure_probes
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
    ("name", "version", "tap", "lambdas"),
    [
        ("logistic", 1, "cls", []),
        ("logistic", 1, "cls", ["auto"]),
        ("knn", 1, "cls-norm", []),
        ("linear", 1, "cls", []),
        ("linear-augmented", 2, "cls", []),
        ("ridge", 1, "cls", []),
        ("ncm", 1, "cls-norm", []),
        ("finetune", 1, "cls-norm", []),
    ],
)
def test_every_probe_has_the_name_version_and_tap_of_record(
    name: str, version: int, tap: str, lambdas: list[str]
) -> None:
    config = EvaluationConfig(probe=[name], lambda_=lambdas)

    ((probe, distribution),) = configure_probes(config, Subset(name="1img", draw=1, rule="", image_ids=("a",)))

    assert (probe.name, probe.version, probe.taps, distribution) == (name, version, (tap,), None)


def test_raw_pixels_on_the_digits_score_what_they_always_did(results: list[Result]) -> None:
    scored = [
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

    assert scored == _read("digits_pixels.json")


def _read(name: str) -> list[dict[str, object]]:
    content: list[dict[str, object]] = json.loads((_GOLDEN / name).read_text())
    return content
