"""Forecasts: what is to be read, what is there already, and about how long it will take."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msn_eval import evaluate
from msn_eval.config.recipes import AugmentedRecipe
from msn_eval.config.request import EvaluationConfig
from msn_eval.evaluation.cost_estimate import CostEstimate, estimate_cost
from msn_eval.evaluation.evaluate import prepare
from msn_eval.evaluation.plan import make_plan
from msn_eval.features.encoder import Encoder

TINY = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an image folder of two classes with 3 labelled and 40 validation images each."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(3)
    for split, count in (("train", 3), ("val", 40)):
        for name in ("ant", "bee"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def request(pictures: Path, folder: Path, **options: object) -> EvaluationConfig:
    given = {"checkpoint": [TINY], "data": str(pictures), "subset": ["1img@1"], "out": str(folder / "runs")}
    return EvaluationConfig(**{**given, "cache": str(folder / "cache"), "device": "cpu", **options})  # type: ignore[arg-type]


def forecast_one(wanted: EvaluationConfig) -> CostEstimate:
    return estimate_cost(make_plan(wanted), run_own_code=True)[0][0]


def measure(wanted: EvaluationConfig) -> None:
    names = ("cache", "device", "probe", "limit")
    options = {name: value for name in names if (value := getattr(wanted, name)) is not None}
    evaluate(wanted.checkpoint, data=str(wanted.data), subsets=wanted.subset, out=wanted.out, **options)


def test_all_is_to_be_read_at_first(pictures: Path, tmp_path: Path) -> None:
    found = forecast_one(request(pictures, tmp_path))
    sizes = [path.stat().st_size for path in (pictures / "val").rglob("*.png")]
    assert (found.read, found.reused, found.finished) == (82, 0, 0)
    assert sum(sizes) < found.bytes < sum(sizes) * 1.1


def test_many_images_are_timed(pictures: Path, tmp_path: Path) -> None:
    seconds = forecast_one(request(pictures, tmp_path)).seconds
    assert seconds is not None
    assert 0 < seconds < 60


def test_few_images_are_not_timed(pictures: Path, tmp_path: Path) -> None:
    assert forecast_one(request(pictures, tmp_path, limit=20)).seconds is None


def test_what_is_kept_is_to_be_reused(pictures: Path, tmp_path: Path) -> None:
    measure(request(pictures, tmp_path, limit=20))
    found = forecast_one(request(pictures, tmp_path))
    assert (found.read, found.reused) == (40, 42)


def test_another_tap_is_to_be_read(pictures: Path, tmp_path: Path) -> None:
    measure(request(pictures, tmp_path))
    assert forecast_one(request(pictures, tmp_path, probe=["ncm"])).read == 82


def test_finished_results_need_nothing(pictures: Path, tmp_path: Path) -> None:
    measure(request(pictures, tmp_path))
    found = forecast_one(request(pictures, tmp_path))
    assert (found.read, found.reused, found.finished) == (0, 0, 1)


def test_without_a_cache_all_is_to_be_read_again(pictures: Path, tmp_path: Path) -> None:
    measure(request(pictures, tmp_path))
    assert forecast_one(request(pictures, tmp_path, no_cache=True, out=str(tmp_path / "other"))).read == 82


def test_refused_checkpoint_has_its_problem(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()
    plan = make_plan(request(pictures, tmp_path, checkpoint=[str(tmp_path / "empty.pth"), TINY]))
    first, second = estimate_cost(plan, run_own_code=True)[0]
    assert ("empty" in str(first.problem), second.problem, second.read) == (True, None, 82)


def test_own_code_is_run_only_where_that_is_allowed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_network.py").write_text(
        "import torch\n"
        "class Refusing(torch.nn.Module):\n"
        "    image_pixels = 8\n"
        "    def forward(self, images): raise AssertionError('it was run')\n"
        "def make(): return Refusing()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = make_plan(request(pictures, tmp_path, checkpoint=["py:own_network:make"]))
    (found,), _ = estimate_cost(plan, run_own_code=False)
    assert (found.read, found.seconds) == (82, None)


def test_what_was_read_is_at_hand_for_the_evaluation(pictures: Path, tmp_path: Path) -> None:
    _, prepared = estimate_cost(make_plan(request(pictures, tmp_path)), run_own_code=True)
    assert list(prepared) == [TINY]


def test_time_is_that_of_one_image_times_all(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("msn_eval.evaluation.cost_estimate.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    decoding, encoding = 1 / 16, 1 / 3  # of every measurement of a second; three images are what patience allows
    assert forecast_one(request(pictures, tmp_path)).seconds == pytest.approx(82 * (decoding + encoding))


def test_labelled_images_are_timed_without_the_patches_that_are_dropped(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("msn_eval.evaluation.cost_estimate.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def take(seconds: float) -> Callable[..., dict[str, Tensor]]:
        def encode(encoder: Encoder, pixels: Tensor, *others: object) -> dict[str, Tensor]:
            clock[0] += seconds * len(pixels)
            return {"cls": torch.zeros(len(pixels), 2)}

        return encode

    monkeypatch.setattr("msn_eval.evaluation.cost_estimate.encode", take(3.0))
    monkeypatch.setattr("msn_eval.evaluation.cost_estimate.encode_kept", take(1.0))

    assert forecast_one(request(pictures, tmp_path, patch_drop=0.5)).seconds == 80 * 3 + 2 * 1
    assert forecast_one(request(pictures, tmp_path)).seconds == 82 * 3


def test_bytes_are_those_of_the_images_that_are_missing(pictures: Path, tmp_path: Path) -> None:
    whole, some = forecast_one(request(pictures, tmp_path)), forecast_one(request(pictures, tmp_path, limit=20))
    measure(request(pictures, tmp_path, limit=20))
    assert forecast_one(request(pictures, tmp_path)).bytes == whole.bytes - some.bytes


@pytest.mark.parametrize("probe", ["logistic", "ncm"])
def test_image_that_lacks_one_tap_of_two_is_to_be_read(pictures: Path, tmp_path: Path, probe: str) -> None:
    measure(request(pictures, tmp_path, probe=[probe]))
    both = request(pictures, tmp_path, probe=["logistic", "ncm"], out=str(tmp_path / "other"))
    assert forecast_one(both).read == 82


def test_checkpoints_are_at_hand_as_far_as_memory_is_spent_on_them(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(request(pictures, tmp_path, limit=1))
    needed = 4 * prepare(plan, TINY).encoder.checkpoint.params
    found = []
    for limit in (needed, needed - 1):
        monkeypatch.setattr("msn_eval.evaluation.cost_estimate._KEPT_BYTES", limit)
        found.append(len(estimate_cost(plan, run_own_code=True)[1]))
    assert found == [1, 0]


def test_epochs_of_a_training_on_augmented_images_are_counted_and_timed(pictures: Path, tmp_path: Path) -> None:
    recipe = AugmentedRecipe(lr=[1.0, 2.0], epochs=50)
    wanted = request(pictures, tmp_path, limit=20, probe=["linear-augmented"], linear_augmented=recipe)

    found = forecast_one(wanted)

    assert (found.read, found.augmented) == (40, 50 * 2)  # both rates share the two labelled images' passes
    assert found.seconds is not None
