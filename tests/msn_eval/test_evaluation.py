"""The corridor from Python: the same numbers whatever the batch, the loader and the moment."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msn_eval import evaluate
from msn_eval.errors import UsageError
from msn_eval.result import Result, read_predictions

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
