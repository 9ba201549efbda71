"""Patches dropped from labelled images: features, cache, protocol and records."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msn_eval import evaluate
from msn_eval.commands.evaluate import describe_plan
from msn_eval.config.request import EvaluationConfig
from msn_eval.data import read_dataset
from msn_eval.data.hashing import hash_images
from msn_eval.data.images import ImageSet
from msn_eval.errors import UsageError
from msn_eval.evaluation.cost_estimate import estimate_cost
from msn_eval.evaluation.plan import make_plan
from msn_eval.features.encoder import Encoder, load_encoder
from msn_eval.features.extraction import extract_features
from msn_eval.features.patch_drop import PatchDrop
from msn_eval.reports.html.provenance import format_command
from msn_eval.results.record import Result

HALF = PatchDrop(share=0.5, seed=0)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("demo", device="cpu")


@pytest.fixture(scope="module")
def images() -> ImageSet:
    train = read_dataset("digits").train
    return train.only(train.ids[::50])


def make_config(tmp_path: Path, **options: object) -> EvaluationConfig:
    given = {"checkpoint": ["demo"], "data": "digits", "subset": ["1img@1"], "limit": 2, "device": "cpu"}
    folders = {"out": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")}
    return EvaluationConfig(**{**given, **folders, **options})  # type: ignore[arg-type]


def measure(tmp_path: Path, **options: object) -> Result:
    config = dict(vars(make_config(tmp_path, **options)))
    names, subsets, probes = (config.pop(name) for name in ("checkpoint", "subset", "probe"))
    config["tests"] = config.pop("test")
    (result,) = evaluate(names, data=config.pop("data"), subsets=subsets, probes=probes, **config)
    return result


def test_kept_features_are_those_of_a_pass_without_a_cache(encoder: Encoder, images: ImageSet, tmp_path: Path) -> None:
    hashes = hash_images(images, cache_dir=None)
    plain = extract_features(encoder, images, taps=["cls"], drop=HALF)
    for read in (len(images), 0):
        kept = extract_features(encoder, images, taps=["cls"], hashes=hashes, drop=HALF, cache=tmp_path)
        assert kept.read == read
        assert torch.equal(kept.features["cls"].values, plain.features["cls"].values)


@pytest.mark.parametrize("other", [None, PatchDrop(share=0.25, seed=0), PatchDrop(share=0.5, seed=1)])
def test_features_of_another_drop_are_not_reused(
    encoder: Encoder, images: ImageSet, tmp_path: Path, other: PatchDrop | None
) -> None:
    hashes = hash_images(images, cache_dir=None)
    first, second = (
        extract_features(encoder, images, taps=["cls"], hashes=hashes, drop=drop, cache=tmp_path)
        for drop in (HALF, other)
    )

    assert second.read == len(images)
    assert not torch.equal(first.features["cls"].values, second.features["cls"].values)


def test_equal_files_with_different_ids_lose_different_patches(
    encoder: Encoder, images: ImageSet, tmp_path: Path
) -> None:
    first = images.only(images.ids[:1])
    renamed = replace(first, source=_Renamed(first), ids=("0/copy.png",))
    rows = [
        extract_features(
            encoder, some, taps=["cls"], hashes=hash_images(some, cache_dir=None), drop=HALF, cache=tmp_path
        )
        for some in (first, renamed)
    ]

    assert rows[1].read == 1
    assert not torch.equal(rows[0].features["cls"].values, rows[1].features["cls"].values)


class _Renamed:
    """The same bytes under another id."""

    root = None

    def __init__(self, images: ImageSet) -> None:
        self.source, self.image_id = images.source, images.ids[0]

    def read(self, image_id: str) -> bytes:
        return self.source.read(self.image_id)

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)


def test_a_drop_given_by_hand_is_hashed_and_its_seed_with_it(tmp_path: Path) -> None:
    def by_hand(**options: object) -> object:
        return make_plan(make_config(tmp_path, **options)).tasks[0].protocol["by_hand"]

    assert by_hand() == {}
    assert by_hand(patch_drop=0.0, seed=5) == {"patch_drop": 0.0}
    assert by_hand(patch_drop=0.5, seed=5) == {"patch_drop": 0.5, "seed": 5}


def test_nothing_dropped_predicts_as_without_the_option_from_the_same_features(tmp_path: Path) -> None:
    plain, none = measure(tmp_path), measure(tmp_path, patch_drop=0.0)

    assert none.id != plain.id
    assert (none.probe.objective, none.metrics) == (plain.probe.objective, plain.metrics)
    assert none.timing_s.images_per_second is None  # every feature is from the cache


def test_validation_images_keep_all_patches(tmp_path: Path) -> None:
    measure(tmp_path)

    plan = make_plan(make_config(tmp_path, patch_drop=0.5))
    (cost,), _ = estimate_cost(plan, run_own_code=True)

    assert (cost.read, cost.reused) == (10, 20)  # the labelled images are read again
    assert "0.5 of the patches of each dropped" in describe_plan(plan)


def test_record_gives_the_command_that_repeats_it(tmp_path: Path) -> None:
    command = format_command(measure(tmp_path, patch_drop=0.5, seed=7))

    assert "--patch-drop 0.5" in command
    assert command.count("--seed 7") == 1


def test_other_networks_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pixels .* is not a plain Vision Transformer"):
        measure(tmp_path, checkpoint=["pixels"], patch_drop=0.5)
