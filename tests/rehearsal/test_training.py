"""Training on the simulated device: the losses and weights of a CPU, with few waits of the host per step."""

import signal
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from simulated_cuda import compute_as_simulated

from msn_eval import evaluate
from msn_eval.checkpoints.run_folder import newest_snapshot
from msn_eval.distributed.group import Group
from msn_eval.errors import NumericalError
from msn_eval.probes import linear_augmented
from msn_eval.probes.finetune import train as finetuning
from msn_eval.results.record import Result, read_predictions
from msn_pretrain.config.load import read_recipe
from msn_pretrain.data import view_loader
from msn_pretrain.data.batched_views import make_batched_views
from msn_pretrain.training import train as training
from msn_pretrain.training.journal import METRICS, read_metrics
from msn_pretrain.training.snapshot import read_snapshot

Simulate = Callable[[], Any]
# Waits of the host per step, with the views or features of the step. Numbers may only go down.
BUDGETS = {"msn": 0, "simsiam": 0, "finetune": 1, "linear-augmented": 1}
RECIPES = {
    "msn": """
run: {seed: 3, log_every: 3, keep_every: 0}
data: {root: digits, workers: 0, limit: 2}
views: {image_pixels: 16, focal_pixels: 8, focal_views: 2, focal_crop_scale: [0.2, 0.6], made: device}
encoder: {name: "vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=1&num_heads=2"}
head: {hidden: 32, output: 16}
masking: {ratio: 0.3, per_image: true}
criterion: {prototypes: 16}
optimization: {epochs: 3, batch_size: 8, warmup: 1}
ema: {start: 0.9}
watch: {probe_every: 0}
""",
    "simsiam": """
method: simsiam
run: {seed: 3, log_every: 3, keep_every: 0}
data: {root: digits, workers: 0, limit: 2}
views: {image_pixels: 16, random_views: 2, focal_views: 0, made: device}
encoder: {name: "resnet18?channels=(8,8,8,8)&layers=(1,1,1,1)", stem: cifar}
projector: {layers: 2, output: 16, predictor: 8}
optimization: {epochs: 3, batch_size: 8, warmup: 1}
watch: {probe_every: 0}
""",
}
# What torch refuses on CUDA in deterministic mode, as its documentation of `use_deterministic_algorithms` lists it.
REFUSED = {
    *(
        "_adaptive_avg_pool2d_backward",
        "adaptive_max_pool2d_backward",
        "avg_pool3d_backward",
        "fractional_max_pool2d_backward",
    ),
    *("upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward", "upsample_bicubic2d_backward"),
    *(
        "_upsample_bicubic2d_aa_backward",
        "upsample_linear1d_backward",
        "reflection_pad2d_backward",
        "nll_loss2d_forward",
    ),
    *(
        "_ctc_loss_backward",
        "_embedding_bag_backward",
        "put",
        "put_",
        "histc",
        "median",
        "kthvalue",
        "grid_sampler_2d_backward",
    ),
}
# Batch normalisation subtracts these: their gradient is rounding, which Adam scales to steps of full size.
WITHOUT_GRADIENT = ("head.fc1.bias", "head.fc2.bias", "network.norm.bias", "running_mean")
PROBES: dict[str, tuple[ModuleType, dict[str, Any]]] = {
    "finetune": (
        finetuning,
        {"finetune": {"epochs": 2, "batch": 8, "warmup_epochs": 1, "flip": 0.0, "mixup": 0.8, "head_lambda": 0.01}},
    ),
    "linear-augmented": (linear_augmented, {"linear_augmented": {"lr": [2.0, 8.0], "epochs": 2, "batch_size": 8}}),
}


@pytest.fixture(autouse=True)
def make_views_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU make its views as a GPU does, so that both train on the same bytes: the resize rounds differently."""
    monkeypatch.setattr(view_loader, "make_views_on", make_batched_views)


def _train(
    name: str, folder: Path, device: str, *overrides: str, precision: str = "fp32", code: int = 0
) -> dict[str, torch.Tensor]:
    """Train a recipe, and return the model of its newest snapshot."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPES[name])
    own = [f"run.dir={folder / 'run'}", f"run.precision={precision}", "run.attention=fused"]
    recipe = read_recipe(folder / "recipe.yaml", overrides=[*own, *overrides])
    assert training.train(recipe, Group(rank=0, world=1, device=torch.device(device))) == code
    files, _ = newest_snapshot(folder / "run")
    assert files is not None
    return dict(read_snapshot(files).model)


def _metrics(folder: Path) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each line that a run logged."""
    return [(line["loss"], line["gradient_norm"]) for line in read_metrics(folder / "run" / METRICS)[0]]


def _check_runs(folder: Path, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    here, there = (_metrics(folder / place) for place in ("cuda", "cpu"))
    assert len(here) == 2
    assert here == [pytest.approx(line, rel=1e-4) for line in there]
    keys = [key for key in expected if not key.endswith(WITHOUT_GRADIENT)]
    assert 2 * len(keys) > len(expected)
    flat, other = (torch.cat([model[key].double().flatten() for key in keys]) for model in (weights, expected))
    assert float((flat - other).norm() / other.norm()) < 1e-5


def _note_waits(device: Any, module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that will hold the total of waits at each call of a function."""
    totals: list[int] = []
    function = getattr(module, name)

    def noting(*arguments: Any, **options: Any) -> Any:
        totals.append(device.waits.total())
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, noting)
    return totals


def _stop_at(step: int, compute: Callable[..., Any]) -> Callable[..., Any]:
    def stop(session: Any, batch: Any, settings: Any) -> Any:
        if batch.batch.step == step:
            signal.raise_signal(signal.SIGTERM)
        return compute(session, batch, settings)

    return stop


def _leave_out(device: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose waits do not count."""

    def run(*arguments: Any, **options: Any) -> Any:
        before = device.waits.copy()
        function(*arguments, **options)
        device.waits = before

    return run


def _waits_by_step(totals: list[int]) -> list[int]:
    return [later - earlier for earlier, later in pairwise(totals)]


def _make_bad(steps: set[int], compute: Callable[..., Any]) -> Callable[..., Any]:
    def compute_badly(session: Any, batch: Any, settings: Any) -> Any:
        step, numbers = compute(session, batch, settings)
        if batch.batch.step in steps:
            numbers["gradient_norm"] = numbers["gradient_norm"] * torch.nan
        return step, numbers

    return compute_badly


@pytest.mark.parametrize("name", RECIPES)
def test_pretraining_has_the_losses_and_weights_of_a_cpu(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """The run on the device is stopped and continues from its snapshot."""
    with compute_as_simulated():
        expected = _train(name, tmp_path / "cpu", "cpu")

    with simulate_cuda() as device:
        totals = _note_waits(device, training, "compute", monkeypatch)
        monkeypatch.setattr(training, "_save", _leave_out(device, training._save))
        with monkeypatch.context() as patched:
            patched.setattr(training, "compute", _stop_at(2, training.compute))
            _train(name, tmp_path / "cuda", "cuda:0", code=75)
        weights = _train(name, tmp_path / "cuda", "cuda:0")

    # Of each step of both runs, whether it is logged or not; the largest number is that between the runs.
    device.check_budget(name, BUDGETS, sorted(_waits_by_step(totals))[-2])
    assert device.products[torch.bfloat16] == 0
    _check_runs(tmp_path, weights, expected)


@pytest.mark.parametrize("on_alarm", ["stop", "rollback"])
def test_steps_that_are_not_finite_have_the_consequences_of_a_cpu(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_alarm: str
) -> None:
    """A single one, which is read when the next step is queued already, and three in a row."""
    monkeypatch.setattr(training, "compute", _make_bad({0, 2, 3, 4}, training.compute))

    def run(device: str) -> tuple[str, dict[str, torch.Tensor], list[Any]]:
        folder, message = tmp_path / device.partition(":")[0], ""
        try:
            _train("msn", folder, device, f"watch.on_alarm={on_alarm}", "run.log_every=1")
        except NumericalError as error:
            message = str(error)
        files, _ = newest_snapshot(folder / "run")
        assert files is not None
        snapshot = read_snapshot(files)
        alarms = [path.name for path in sorted((folder / "run" / "alarms").iterdir())]
        lines = [line["step"] for line in read_metrics(folder / "run" / METRICS)[0]]
        return message, dict(snapshot.model), [snapshot.step, snapshot.watched, alarms, lines]

    with compute_as_simulated():
        expected = run("cpu")
    with simulate_cuda():
        found = run("cuda:0")

    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert ("3 steps in a row" in found[0]) == (on_alarm == "stop")
    assert found[2][2] == [f"step-{step:08d}-rank-0.json" for step in (0, 2, 3, 4)]
    for key, value in found[1].items():
        torch.testing.assert_close(value, expected[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("msn", 7), ("simsiam", 4)])
def test_the_next_batch_is_copied_beside_the_kernels_of_a_step_whose_numbers_are_read_a_step_late(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, count: int
) -> None:
    monkeypatch.setattr(training, "_is_due", lambda *given: False)  # the last step alone ends with a snapshot
    with simulate_cuda() as device:
        _train(name, tmp_path, "cuda:0")

    def positions(kind: str) -> list[int]:
        """Return where the loss and the other numbers of each step are copied or read."""
        return [at for at in device.positions(kind, dtype=torch.float32) if device.log[at].shape == (count,)]

    uploads = device.positions("upload", dtype=torch.uint8)  # one buffer of pixels per batch
    downloads = positions("download")
    device.check_ahead(downloads, positions("fetch"))
    kernels = [at - 1 for at in downloads]  # the last ones of each step
    assert all(device.may_overlap(*pair) for pair in zip(uploads[1:], kernels, strict=False))
    assert not any(device.may_overlap(*pair) for pair in zip(uploads, kernels, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_pretraining_in_bf16_is_that_of_a_cpu_and_uses_no_operation_that_deterministic_mode_refuses(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    operations: dict[str, bool] = {}
    with compute_as_simulated():
        expected = _train(name, tmp_path / "cpu", "cpu", precision="bf16")

    with simulate_cuda() as device:
        execute = device.execute

        def note(operation: Any, *arguments: Any) -> Any:
            operations[operation._schema.name.partition("::")[2]] = torch.are_deterministic_algorithms_enabled()
            return execute(operation, *arguments)

        monkeypatch.setattr(device, "execute", note)
        weights = _train(name, tmp_path / "cuda", "cuda:0", precision="bf16")

    assert device.products[torch.bfloat16] > device.products[torch.float32]
    assert operations["mm"]  # deterministic mode was on
    assert operations.keys() & REFUSED == set()
    _check_runs(tmp_path, weights, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PROBES)
def test_probes_that_train_have_the_predictions_of_a_cpu(
    simulate_cuda: Simulate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, precision: str
) -> None:
    module, options = PROBES[name]

    def run(device: str) -> list[Result]:
        return evaluate(
            ["random:vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=2&num_heads=2"], data="digits",
            subsets=["2imgs@1"], probes=[name], out=tmp_path / device, device=device, precision=precision, no_cache=True,
            limit=4, batch_size=4, **options,
        )  # fmt: skip

    with compute_as_simulated():
        expected = run("cpu")
    with simulate_cuda() as device:
        totals = _note_waits(device, module, "take_step", monkeypatch)
        results = run("cuda")

    device.check_budget(name, BUDGETS, statistics.median(_waits_by_step(totals)))
    assert (device.products[torch.bfloat16] > 0) == (precision == "bf16")
    assert [item.status for item in results] == ["ok"] * len(expected)
    for item, other in zip(results, expected, strict=True):
        assert item.probe.objective == pytest.approx(other.probe.objective, rel=1e-6)
        scores = [read_predictions(tmp_path / place / str(item.predictions)) for place in ("cuda", "cpu")]
        assert (scores[0].prediction == scores[1].prediction).all()
