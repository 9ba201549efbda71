import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from PIL import Image

from msn_eval.checkpoints.run_folder import check_snapshot, newest_snapshot, snapshot_folders
from msn_eval.data import read_split
from msn_eval.distributed.group import Group as Group
from msn_eval.errors import NumericalError, StoreError, UsageError
from msn_pretrain.config.load import read_recipe
from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.data import view_loader
from msn_pretrain.data.sampler import Order
from msn_pretrain.methods.msn import MSN
from msn_pretrain.training import train as training
from msn_pretrain.training.journal import METRICS, TIMING, read_metrics
from msn_pretrain.training.run import Recipe, build_learner
from msn_pretrain.training.snapshot import equal, read_snapshot
from msn_pretrain.training.train import train


class SmallDisk(Protocol):
    """A file system of its own, as the fixture mounts it."""

    folder: Path

    def resize(self, size: str) -> None: ...


_CPU = torch.device("cpu")
_ALONE = Group(rank=0, world=1, device=_CPU)
Read = Callable[..., MSNRecipe]


def _outcome(run: Path) -> dict[str, Any]:
    """Return everything of a finished run that must not depend on interruptions."""
    files, _ = newest_snapshot(run)
    assert files is not None
    lines = [
        {name: value for name, value in line.items() if name not in TIMING} for line in read_metrics(run / METRICS)[0]
    ]
    state = torch.load(files.state, weights_only=True)
    return state | {"encoder": files.files["encoder.safetensors"], "lines": json.dumps(lines), "step": files.step}


def _stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM in the middle of a step."""
    compute = training.compute

    def stopping(session: Any, batch: Any, settings: Any) -> Any:
        if batch.batch.step == step:
            signal.raise_signal(signal.SIGTERM)
        return compute(session, batch, settings)

    monkeypatch.setattr(training, "compute", stopping)


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (4, 2), (7, 1)])
def test_stopped_run_resumes_bit_identically(
    tiny: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, workers: int
) -> None:
    _check_resumption(tiny(f"run.dir={tmp_path / 'full'}"), tiny(f"data.workers={workers}"), step, monkeypatch)


def _check_resumption(full: Recipe, stopped: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train `full` without and `stopped` with a stop in the middle of a step, and compare."""
    assert train(full, _ALONE) == 0
    with monkeypatch.context() as patched:
        _stop_at(step, patched)
        assert train(stopped, _ALONE) == 75
    run = Path(stopped.run.dir)
    assert [line["step"] for line in read_metrics(run / METRICS)[0]] == list(range(1, step + 2))

    assert train(stopped, _ALONE) == 0

    expected, resumed = _outcome(Path(full.run.dir)), _outcome(run)
    assert [name for name in expected if not equal(expected[name], resumed[name])] == []


def test_stopped_simsiam_run_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "simsiam.yaml").write_text(
        "method: simsiam\nrun: {device: cpu, seed: 3, log_every: 1}\ndata: {root: digits, workers: 0, limit: 2}\n"
        "encoder: {name: 'resnet18?channels=(8,8,8,8)', stem: cifar, drop_path: 0.2}\n"
        "views: {image_pixels: 16, random_views: 2, focal_views: 0}\n"
        "projector: {layers: 2, output: 16, predictor: 8}\noptimization: {epochs: 2, batch_size: 5, warmup: 1}\n"
    )
    full, stopped = (
        read_recipe(tmp_path / "simsiam.yaml", overrides=[f"run.dir={tmp_path / name}"]) for name in ("full", "run")
    )
    _check_resumption(full, stopped, 3, monkeypatch)


def test_changed_recipe_is_refused_with_its_differences(tiny: Read) -> None:
    train(tiny("optimization.epochs=1"), _ALONE)

    with pytest.raises(UsageError, match=r"optimization.epochs: folder 1, now 2") as refused:
        train(tiny(), _ALONE)

    assert "--allow-config-change optimization.epochs" in str(refused.value)
    assert train(tiny(), _ALONE, allowed=["optimization.epochs"]) == 0


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a tree of images without classes."""
    for number in range(20):
        path = tmp_path / "photos" / ("more/below" if number % 3 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (12 * number, number, 90)).save(path)
    return tmp_path / "photos"


def test_images_without_classes_train_a_run_without_its_online_probe(
    tiny: Read, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny(
        f"data.root={photos}", "data.limit=0", "optimization.epochs=1", "watch.probe_every=1", "watch.probes=[knn]"
    )
    assert train(recipe, _ALONE) == 0
    assert [message for message in caplog.messages if "probe" in message] == [
        "the online probe is off: these images have no classes; watch.probe_data=X names a data set for it"
    ]
    assert not list((Path(recipe.run.dir) / "eval").glob("*.json"))


def test_online_probe_on_another_data_set_needs_no_classes_of_the_run(tiny: Read, photos: Path) -> None:
    recipe = tiny(f"data.root={photos}", "data.limit=0", "optimization.epochs=1", "watch.probe_every=1",
                  "watch.probe_data=digits", "watch.subset=1img@1", "watch.probes=[ncm]")  # fmt: skip
    assert train(recipe, _ALONE) == 0
    assert len(list((Path(recipe.run.dir) / "eval").glob("*.json"))) == 1


def test_other_images_are_refused(tiny: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny("optimization.epochs=1"), _ALONE)
    images = read_split("digits", "train").first_of_each_class(5)
    monkeypatch.setattr(training, "training_images", lambda recipe: images)

    with pytest.raises(UsageError, match="training images are not those"):
        train(tiny("optimization.epochs=1"), _ALONE)


def _make_steps_bad(first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the gradients of some steps, counted from 0, not finite."""
    compute = training.compute

    def compute_badly(session: Any, batch: Any, settings: Any) -> Any:
        step, numbers = compute(session, batch, settings)
        if first <= batch.batch.step <= last:
            numbers["gradient_norm"] = torch.full_like(numbers["gradient_norm"], torch.nan)
        return step, numbers

    monkeypatch.setattr(training, "compute", compute_badly)


def test_a_loss_that_is_not_finite_stops_the_run_and_changes_no_weights(
    tiny: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_steps_bad(6, 99, monkeypatch)
    with pytest.raises(NumericalError, match="3 steps in a row"):
        train(tiny("run.snapshot_minutes=0.00001"), _ALONE)

    dumped = json.loads((tmp_path / "run" / "alarms" / "step-00000006-rank-0.json").read_text())
    assert dumped.keys() == {"step", "rank", "facts", "images"}
    assert (dumped["step"], dumped["rank"], len(dumped["images"])) == (6, 0, 8)
    assert _outcome(tmp_path / "run")["step"] >= 6


def test_weights_that_overflow_stop_the_run_at_the_third_bad_step(tiny: Read, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="not finite in 3 steps in a row"):
        train(tiny("optimization.start_learning_rate=1e30"), _ALONE)

    lines = read_metrics(tmp_path / "run" / METRICS)[0]
    assert [line["loss"] for line in lines[1:]] == [None] * 3
    assert [path.name for path in sorted((tmp_path / "run" / "alarms").iterdir())] == [
        f"step-{line['step'] - 1:08d}-rank-0.json" for line in lines[1:]
    ]


def test_rollback_restores_the_last_weights_and_continues_after_the_bad_steps(
    tiny: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _make_steps_bad(6, 8, monkeypatch)
    recipe = tiny("watch.on_alarm=rollback", "run.keep_every=1")

    assert train(recipe, _ALONE) == 0

    assert (
        "step 9: loss or gradient was not finite in 3 steps in a row; continuing with the weights of step 5"
        in caplog.text
    )
    epoch, after, _ = (read_snapshot(check_snapshot(folder)) for folder in reversed(snapshot_folders(tmp_path / "run")))
    assert (epoch.step, after.step) == (5, 9)
    assert equal(epoch.model, after.model)
    assert equal(epoch.optimizer, after.optimizer)
    assert len(read_metrics(tmp_path / "run" / METRICS)[0]) == 10


def test_run_that_stays_bad_after_its_rollbacks_stops(
    tiny: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _make_steps_bad(5, 99, monkeypatch)

    with pytest.raises(NumericalError, match="3 steps in a row"):
        train(tiny("watch.on_alarm=rollback", "run.keep_every=1", "optimization.epochs=4"), _ALONE)

    assert caplog.text.count("continuing with the weights of step") == 3
    assert read_metrics(tmp_path / "run" / METRICS)[0][-1]["step"] == 17


def test_full_disk_stops_training_only_after_the_next_epoch(
    tiny: Read, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "_RETRY_SECONDS", 0.0)
    run = small_disk.folder / "run"

    with pytest.raises(StoreError, match="No space left"):
        train(tiny(f"run.dir={run}", "optimization.epochs=4"), _ALONE)

    assert len(read_metrics(run / METRICS)[0]) == 10
    assert "training continues without a snapshot of step 5" in caplog.text
    assert list((run / "checkpoints").iterdir()) == []  # what was written of it does not fill the disk


def test_training_continues_when_a_full_disk_has_space_again(
    tiny: Read, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute, run = training.compute, small_disk.folder / "run"

    def fill_disk_meanwhile(session: Any, batch: Any, settings: Any) -> Any:
        if batch.batch.step == 1:
            (run / "rest").write_bytes(bytes(shutil.disk_usage(run).free))
        elif batch.batch.step == 8:
            small_disk.resize("2m")
        return compute(session, batch, settings)

    monkeypatch.setattr(training, "compute", fill_disk_meanwhile)
    monkeypatch.setattr(training, "_RETRY_SECONDS", 0.0)
    recipe = tiny(f"run.dir={run}", "watch.probe_every=1", "watch.subset=1img", "watch.probes=[ncm]")

    assert train(recipe, _ALONE) == 0

    assert [line["step"] for line in read_metrics(run / METRICS)[0]] == list(range(1, 11))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010"]
    assert "the encoder could not be evaluated" in caplog.text


def test_encoder_is_evaluated_on_schedule_as_ordinary_records(tiny: Read, tmp_path: Path) -> None:
    train(tiny("watch.probe_every=1", "watch.subset=1img", "watch.probes=[knn]"), _ALONE)

    records = [json.loads(path.read_text()) for path in (tmp_path / "run" / "eval").glob("*.json")]

    assert {record["checkpoint"]["epoch"] for record in records} == {1, 2}
    assert {record["status"] for record in records} == {"ok"}
    assert {record["checkpoint"]["name"] for record in records} == {"run"}


@pytest.mark.parametrize("wanted", [True, False])
def test_only_encoders_are_compiled_and_only_on_request(
    tiny: Read, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network, dynamic: compiled.append(network))

    model = build_learner(tiny(f"run.compile={wanted}"), _ALONE.device).model

    assert isinstance(model, MSN)
    assert compiled == ([model.anchor.trunk, model.target.trunk] if wanted else [])


def test_two_local_ranks_train_as_one(tiny: Read, tmp_path: Path) -> None:
    settings = ["encoder.drop_path=0.0", "optimization.epochs=1"]
    train(tiny(f"run.dir={tmp_path / 'one'}", *settings), _ALONE)
    arguments = [str(tmp_path / "tiny.yaml"), f"run.dir={tmp_path / 'two'}", *settings, "run.device=cpu,cpu"]

    done = subprocess.run(
        [sys.executable, "-m", "msn_pretrain", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / name / METRICS)[0] for name in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert [line["gradient_norm"] for line in two] == pytest.approx([line["gradient_norm"] for line in one], rel=1e-3)


@pytest.mark.parametrize("pinned", [True, False])
def test_memory_of_batches_is_page_locked_as_the_recipe_says(
    tiny: Read, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        view_loader, "DataLoader", lambda dataset, *, pin_memory, **options: asked.append(pin_memory) or []
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    recipe = tiny("data.workers=1", f"data.pin_memory={str(pinned).lower()}")
    images = read_split("digits", "train").first_of_each_class(2)
    order = Order(n_images=len(images), batch_size=8, seed=3)
    ranks = Group(rank=0, world=1, device=torch.device("cuda", 0))
    session = training.Session(
        recipe=recipe, ranks=ranks, run=Path(), images=images, order=order, steps=0, learner=build_learner(recipe, _CPU)
    )

    assert list(training.load_session_views(session, 0)) == []

    assert asked == [pinned]
