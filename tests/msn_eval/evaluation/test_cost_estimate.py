"""Cost estimates: images to read, features to reuse, and the time it takes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msn_eval.config.recipes import AugmentedRecipe, FinetuneRecipe
from msn_eval.config.request import EvaluationConfig
from msn_eval.evaluation import cost_estimate
from msn_eval.evaluation.cost_estimate import CostEstimate, estimate_cost
from msn_eval.evaluation.evaluate import evaluate_all, prepare
from msn_eval.evaluation.plan import Plan, make_plan

TINY = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"
MakePlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image folder of two classes with 3 labelled and 40 validation images each."""
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


@pytest.fixture
def plan(pictures: Path, tmp_path: Path) -> MakePlan:
    """Return a function from options to a plan on the pictures."""

    def make(**options: object) -> Plan:
        given = {"checkpoint": [TINY], "data": str(pictures), "subset": ["1img@1"], "out": str(tmp_path / "runs")}
        given |= {"cache": str(tmp_path / "cache"), "device": "cpu"}
        return make_plan(EvaluationConfig(**given | options))  # type: ignore[arg-type]

    return make


def _estimate(plan: Plan) -> CostEstimate:
    return estimate_cost(plan, run_own_code=True)[0][0]


def test_everything_is_read_at_first(plan: MakePlan, pictures: Path) -> None:
    cost = _estimate(plan())

    sizes = [path.stat().st_size for path in (pictures / "val").rglob("*.png")]
    assert (cost.read, cost.reused, cost.finished) == (82, 0, 0)
    assert sum(sizes) < cost.bytes < sum(sizes) * 1.1


def test_many_images_are_timed_and_few_are_not(plan: MakePlan) -> None:
    seconds = _estimate(plan()).seconds

    assert seconds is not None
    assert 0 < seconds < 60
    assert _estimate(plan(limit=20)).seconds is None


def test_cached_features_are_reused_and_their_bytes_not_read(plan: MakePlan) -> None:
    complete, some = _estimate(plan()), _estimate(plan(limit=20))
    evaluate_all(plan(limit=20))

    cost = _estimate(plan())

    assert (cost.read, cost.reused) == (40, 42)
    assert cost.bytes == complete.bytes - some.bytes


@pytest.mark.parametrize(
    ("measured", "options", "read"),
    [
        ("logistic", {"probe": ["ncm"]}, 82),
        ("logistic", {"probe": ["logistic", "ncm"], "out": "other"}, 82),
        ("ncm", {"probe": ["logistic", "ncm"], "out": "other"}, 82),
        ("logistic", {"no_cache": True, "out": "other"}, 82),
        ("logistic", {"out": "other"}, 0),
    ],
    ids=str,
)
def test_an_image_is_read_if_the_cache_lacks_one_of_the_taps(
    plan: MakePlan, tmp_path: Path, measured: str, options: dict[str, object], read: int
) -> None:
    evaluate_all(plan(probe=[measured]))
    if "out" in options:
        options = options | {"out": str(tmp_path / "other")}

    assert _estimate(plan(**options)).read == read


def test_finished_results_cost_nothing(plan: MakePlan) -> None:
    evaluate_all(plan())

    cost = _estimate(plan())

    assert (cost.read, cost.reused, cost.finished) == (0, 0, 1)


def test_refused_checkpoint_has_its_problem(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "empty.pth").touch()

    first, second = estimate_cost(plan(checkpoint=[str(tmp_path / "empty.pth"), TINY]), run_own_code=True)[0]

    assert ("empty" in str(first.problem), second.problem, second.read) == (True, None, 82)


def test_own_code_is_run_only_if_that_is_allowed(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_network.py").write_text(
        "import torch\n"
        "class Refusing(torch.nn.Module):\n"
        "    image_pixels = 8\n"
        "    def forward(self, images): raise AssertionError('it was run')\n"
        "def make(): return Refusing()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    (cost,), _ = estimate_cost(plan(checkpoint=["py:own_network:make"]), run_own_code=False)

    assert (cost.read, cost.seconds) == (82, None)


def test_checkpoints_are_kept_as_far_as_their_memory_allows(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    small = plan(limit=1)
    needed = 4 * prepare(small, TINY).encoder.checkpoint.params
    kept = []
    for limit in (needed, needed - 1):
        monkeypatch.setattr(cost_estimate, "_KEPT_BYTES", limit)
        kept.append(list(estimate_cost(small, run_own_code=True)[1]))
    assert kept == [[TINY], []]


def test_epochs_of_a_training_on_augmented_images_are_counted_and_timed(plan: MakePlan) -> None:
    recipe = AugmentedRecipe(lr=[1.0, 2.0], epochs=50)

    cost = _estimate(plan(limit=20, probe=["linear-augmented"], linear_augmented=recipe))

    assert (cost.read, cost.augmented) == (40, 50 * 2)  # both rates share the passes of the two labelled images
    assert cost.seconds is not None


def test_steps_of_a_fine_tuning_are_counted_and_timed(plan: MakePlan) -> None:
    recipe = FinetuneRecipe(epochs=30, batch=2)

    cost = _estimate(plan(limit=1, probe=["finetune"], finetune=recipe))

    assert (cost.read, cost.tuned) == (0, 60)
    assert cost.seconds is not None
