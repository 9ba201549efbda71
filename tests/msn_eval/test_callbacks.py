"""Callbacks: a network is measured while it is trained, and does not notice."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import msn_eval
from msn_eval.callbacks import LowShot
from msn_eval.data import read_split
from msn_eval.data.images import make_eval_transform
from msn_eval.data.loader import PixelList, load_pixels
from msn_eval.errors import CheckpointError, NumericalError, UsageError
from msn_eval.results.folder import list_results

_PIXELS = 8


class Backbone(nn.Module):
    """A tiny network with every kind of state: batch statistics, dropout, and values that it keeps between batches."""

    image_pixels, mean, std = _PIXELS, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * _PIXELS**2, 16), nn.BatchNorm1d(16), nn.Dropout())
        self.scale: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = images.new_ones(16) * 2
        return self.body(images) * self.scale  # type: ignore[no-any-return]


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone()


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """Return 100 normalised training images and their labels."""
    images = read_split("digits", "train")
    transform = make_eval_transform(_PIXELS)
    chosen = images.ids[::10]
    pixels = PixelList(source=images.source, image_ids=chosen, transform=transform, hashes=None)
    (batch,) = load_pixels(pixels, batch_size=len(chosen), workers=0)
    values = torch.as_tensor(batch.pixels).permute(0, 3, 1, 2) / 127.5 - 1
    return values, torch.tensor(images.labels)[::10]


def make_backbone() -> Backbone:
    """Return the network as a `py:` factory does."""
    torch.manual_seed(0)
    return Backbone()


def test_accuracies_are_those_of_the_same_network_as_a_checkpoint(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = tmp_path / "factories.py"
    torch.save(backbone.state_dict(), tmp_path / "weights.pt")
    factory.write_text(
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('backbones', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "make = module.make_backbone\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    results = msn_eval.evaluate(
        "py:factories:make", data="digits", subsets="5imgs", probes="ncm", device="cpu", out=tmp_path, no_cache=True
    )

    accuracies = LowShot(data="digits", probes="ncm").measure(backbone, epoch=1)

    tops = [result.metrics.top1 for result in results if result.metrics]
    assert accuracies == {"low_shot/5imgs/ncm": sum(tops) / 3}
    assert 0.2 < tops[0] < 1


def test_network_and_random_generators_stay_as_they_were(backbone: Backbone) -> None:
    backbone.train()
    backbone.body[2].eval()  # frozen batch statistics stay frozen
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    weights = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}

    LowShot(data="digits").measure(backbone, epoch=1)

    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert [module.training for module in backbone.body] == [True, True, False, True]
    assert all(torch.equal(weights[name], tensor) for name, tensor in backbone.state_dict().items())


def test_network_is_in_evaluation_mode_only_while_it_is_measured(backbone: Backbone) -> None:
    modes = []
    low_shot = LowShot(data="digits", compute_features=lambda network, x: modes.append(network.training) or network(x))
    backbone.train()

    low_shot.measure(backbone, epoch=1)

    assert set(modes) == {False}
    assert backbone.training


def test_what_the_network_keeps_can_be_trained_with_later(backbone: Backbone) -> None:
    LowShot(data="digits", probes="ncm").measure(backbone, epoch=1)

    backbone(torch.zeros(2, 3, _PIXELS, _PIXELS)).sum().backward()

    assert backbone.body[1].weight.grad is not None


def test_configurations_of_one_probe_have_names_of_their_own(backbone: Backbone) -> None:
    accuracies = LowShot(data="digits", subsets=["1img", "2imgs"], probes=["knn", "ncm"]).measure(backbone, epoch=1)

    assert list(accuracies) == [
        "low_shot/1img/knn",
        "low_shot/1img/ncm",
        "low_shot/2imgs/knn/k=10",
        "low_shot/2imgs/knn/k=20",
        "low_shot/2imgs/ncm",
    ]


def test_records_are_kept_where_asked_for(backbone: Backbone, tmp_path: Path) -> None:
    LowShot(data="digits", probes="ncm", out=tmp_path).measure(backbone, epoch=3)

    names = {
        (result.checkpoint.name, result.checkpoint.epoch, result.split.draw) for result in list_results([tmp_path])
    }
    assert names == {("epoch 3", 3, 1), ("epoch 3", 3, 2), ("epoch 3", 3, 3)}


def test_network_with_nan_is_an_error_and_still_restored(backbone: Backbone) -> None:
    with torch.no_grad():
        backbone.body[1].weight.fill_(float("nan"))

    with pytest.raises(NumericalError, match=r"low_shot/5imgs/logistic: .*not finite"):
        LowShot(data="digits").measure(backbone, epoch=1)

    assert backbone.body[3].training


def test_network_that_returns_no_features_is_an_error(backbone: Backbone) -> None:
    low_shot = LowShot(data="digits", compute_features=lambda network, images: network(images).mean())

    with pytest.raises(CheckpointError, match="the module returned a tensor"):
        low_shot.measure(backbone, epoch=1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"every": 0}, "every is 0"), ({"on_error": "ignore"}, "on_error is 'ignore'")],
)
def test_wrong_argument_is_refused_at_once(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        LowShot(data="digits", **wrong)


def test_wrong_probe_settings_are_reported_by_argument(backbone: Backbone) -> None:
    with pytest.raises(UsageError, match=r"^probes: nothing given"):
        LowShot(data="digits", probes=[]).measure(backbone, epoch=1)


@pytest.fixture
def lightning() -> Iterator[Any]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of Lightning on loaders, loggers and steps
        import pytorch_lightning

        yield pytorch_lightning


def _fit_with_lightning(
    lightning: Any, backbone: Backbone, digits: tuple[Tensor, Tensor], folder: Path, **options: Any
) -> tuple[Any, Any]:
    """Train for two epochs, and return the accuracies of each and the module."""
    from msn_eval.callbacks import LowShotCallback

    logged: list[dict[str, float]] = []

    class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone, nn.Linear(16, 10)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            assert self.training
            assert self.backbone.training
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Recorder(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    low_shot = LowShotCallback(
        "digits",
        compute_features=lambda module, images: module.backbone(images),
        image_pixels=_PIXELS,
        **options,
    )
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[low_shot, Recorder()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Classifier()
    trainer.fit(module, DataLoader(TensorDataset(*digits), batch_size=50))
    return logged, module


def test_lightning_logs_the_accuracy_of_each_epoch(
    lightning: Any, backbone: Backbone, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    logged, module = _fit_with_lightning(lightning, backbone, digits, tmp_path)

    measure = LowShot(
        data="digits", image_pixels=_PIXELS, compute_features=lambda module, images: module.backbone(images)
    )
    assert [list(values) for values in logged] == [["low_shot/5imgs/logistic"]] * 2
    assert logged[1] == pytest.approx(measure.measure(module, epoch=2), abs=1e-6)
    assert logged[0] != logged[1]


def test_lightning_trains_the_same_weights_with_and_without_measuring(
    lightning: Any, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    def train(every: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return dict(_fit_with_lightning(lightning, Backbone(), digits, tmp_path, every=every)[1].state_dict())

    measured, unmeasured = train(1), train(3)

    assert all(torch.equal(measured[name], unmeasured[name]) for name in measured)


def test_lightning_stops_with_the_error(
    lightning: Any, backbone: Backbone, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="No probe is called 'knm'"):
        _fit_with_lightning(lightning, backbone, digits, tmp_path, probes="knm")


def test_lightning_trains_on_where_a_warning_is_asked_for(
    lightning: Any, backbone: Backbone, digits: tuple[Tensor, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged, _ = _fit_with_lightning(lightning, backbone, digits, tmp_path, probes="knm", on_error="warn")

    assert logged == [{}, {}]
    assert "epoch 2 could not be measured: UsageError: probes: No probe is called 'knm'" in caplog.text


def test_lightning_measures_every_second_epoch(
    lightning: Any, backbone: Backbone, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    logged, _ = _fit_with_lightning(lightning, backbone, digits, tmp_path, probes="ncm", every=2)

    assert [list(values) for values in logged] == [[], ["low_shot/5imgs/ncm"]]


def test_lightning_callback_is_one_of_each_loaded_lightning(lightning: Any) -> None:
    from msn_eval import callbacks

    assert issubclass(callbacks.LowShotCallback, lightning.Callback)


class Classifier(nn.Module):
    """A network as transformers' Trainer takes it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(16, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.backbone(pixel_values))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _train_with_transformers(
    backbone: Backbone, digits: tuple[Tensor, Tensor], folder: Path, **options: Any
) -> list[dict[str, float]]:
    """Train for two epochs, and return the log."""
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    from msn_eval.callbacks import LowShotTrainerCallback

    rows = [{"pixel_values": image, "labels": label} for image, label in zip(*digits, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=50, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=Classifier(backbone), args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    callback = LowShotTrainerCallback(
        trainer,
        "digits",
        compute_features=lambda model, images: model.backbone(images),
        image_pixels=_PIXELS,
        **options,
    )
    trainer.add_callback(callback)
    trainer.train()
    return list(trainer.state.log_history)


def test_transformers_logs_the_accuracy_of_each_epoch(
    backbone: Backbone, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    log = _train_with_transformers(backbone, digits, tmp_path)

    measured = [entry for entry in log if "low_shot/5imgs/logistic" in entry]
    assert [entry["epoch"] for entry in measured] == [1.0, 2.0]
    assert measured[1]["low_shot/5imgs/logistic"] == pytest.approx(
        LowShot(data="digits", mean=None).measure(_with_imagenet(backbone), epoch=2)["low_shot/5imgs/logistic"]
    )


def _with_imagenet(backbone: Backbone) -> nn.Module:
    """Return a network without mean and std of its own, as the trained classifier is."""
    network = nn.Sequential(backbone)
    network.image_pixels = _PIXELS  # type: ignore[assignment]
    return network


def test_transformers_stops_with_the_error(backbone: Backbone, digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No probe is called 'knm'"):
        _train_with_transformers(backbone, digits, tmp_path, probes="knm")
