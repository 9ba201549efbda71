"""Fine-tuning: a step does not depend on how it is cut or shared, nor the result on interruptions."""

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.data import read_dataset, read_split
from msn_eval.data.hashing import hash_images
from msn_eval.data.images import ImageSet
from msn_eval.distributed.group import ALONE, Group
from msn_eval.errors import DataError, NumericalError, ResourceError, StoreError
from msn_eval.features.encoder import build_encoder
from msn_eval.probes.finetune import Finetune
from msn_eval.probes.finetune import predict as predict_module
from msn_eval.probes.finetune import train as train_module
from msn_eval.probes.finetune.data import Order
from msn_eval.probes.finetune.model import FinetuneModel, build_finetune_model, build_optimizer
from msn_eval.probes.finetune.predict import LabelledImages, RunOptions, score_images
from msn_eval.probes.finetune.train import Training, finetune
from msn_eval.probes.training_state import StateFiles

_VIT = "random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2"
# Everything that is drawn is in it.
_RECIPE = FinetuneRecipe(
    epochs=3, batch=12, warmup_epochs=1, learning_rate=3e-3, drop_path=0.3, mixup=0.8, cutmix=1.0, erase=0.2, clip=1.0
)
_OPTIONS = RunOptions(micro_batch=64, workers=0)
_SAVE_ALWAYS = replace(_OPTIONS, save_seconds=0.0, epoch_seconds=0.0)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return read_dataset("digits").train.first_of_each_class(2)


def _model(recipe: FinetuneRecipe = _RECIPE, dtype: torch.dtype = torch.float32) -> FinetuneModel:
    encoder = build_encoder(read_checkpoint(_VIT), device=torch.device("cpu"), precision="fp32")
    model = build_finetune_model(encoder, recipe, tap="cls-norm", n_classes=10)
    model.network.to(dtype)
    return model


def _labelled(images: ImageSet) -> LabelledImages:
    return LabelledImages(images=images, labels=torch.tensor(images.labels), hashes=hash_images(images, cache_dir=None))


def _train(
    images: ImageSet, *, recipe: FinetuneRecipe = _RECIPE, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Training, dict[str, Tensor]]:
    model = _model(recipe, dtype)
    arguments = {"precision": "fp32", "options": _OPTIONS} | options
    result = finetune(Finetune(recipe=recipe, seed=1), model, _labelled(images), **arguments)
    return result, {name: item.detach().clone() for name, item in model.network.state_dict().items()}


def _states(folder: Path) -> StateFiles:
    return StateFiles(out=folder, facts={"labelled images": "these"})


def _same(item: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(item[name], other[name]) for name in item | other)


def _distance(item: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((item[name] - other[name]).abs().max()) for name in item)


def test_fine_tuning_learns_the_labels(images: ImageSet) -> None:
    recipe = FinetuneRecipe(epochs=40, batch=20, learning_rate=3e-3, warmup_epochs=2, drop_path=0.0, crop_share=1.0,
                            flip=0.0, randaugment_magnitude=0, label_smoothing=0.0)  # fmt: skip
    model, labelled = _model(recipe), _labelled(images)

    finetune(Finetune(recipe=recipe), model, labelled, precision="fp32", options=_OPTIONS)

    scores = score_images(model, images, labelled.hashes, decoder="pillow", precision="fp32", options=_OPTIONS)
    assert float((scores.argmax(dim=1) == labelled.labels).double().mean()) > 0.9


def test_frozen_blocks_do_not_change(images: ImageSet) -> None:
    before = _model().network.state_dict()

    _, after = _train(images, recipe=replace(_RECIPE, blocks=1))

    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("blocks.1.", "norm.", "head.")) for name in moved)


@pytest.mark.parametrize("part", [2, 10])
def test_accumulated_batches_give_the_steps_of_complete_ones(images: ImageSet, part: int) -> None:
    complete, cut = (
        _train(images, dtype=torch.float64, options=replace(_OPTIONS, micro_batch=size))[1] for size in (64, part)
    )

    assert _distance(complete, cut) < 1e-12


def test_accumulated_batches_agree_in_float32_too(images: ImageSet) -> None:
    recipe = replace(_RECIPE, epochs=1, warmup_epochs=0, learning_rate=1e-3)
    complete, cut = (_train(images, recipe=recipe, options=replace(_OPTIONS, micro_batch=size))[1] for size in (64, 2))

    # Adam's first steps are as long whatever the gradient: where it is rounding alone, so is the step's sign.
    moved = [(complete[name] - cut[name]).abs().flatten() for name in complete]
    assert float(torch.cat(moved).median()) < 1e-6


@pytest.mark.parametrize("stop_after", [1, 4])
def test_killed_training_resumes_to_the_same_bits(images: ImageSet, tmp_path: Path, stop_after: int) -> None:
    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done >= stop_after * 12:
            raise KilledError

    undisturbed = _train(images)
    with pytest.raises(KilledError):
        _train(images, files=_states(tmp_path), options=_SAVE_ALWAYS, on_progress=kill)

    resumed = _train(images, files=_states(tmp_path), options=_SAVE_ALWAYS)

    assert (resumed[0].step, resumed[0].loss) == (undisturbed[0].step, undisturbed[0].loss)
    assert _same(resumed[1], undisturbed[1])


def test_finished_training_is_not_repeated(images: ImageSet, tmp_path: Path) -> None:
    seen: list[int] = []
    _train(images, files=_states(tmp_path), options=_SAVE_ALWAYS)

    _train(images, files=_states(tmp_path), options=_SAVE_ALWAYS, on_progress=lambda done, total: seen.append(done))

    assert seen == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_takes_effect_after_the_step_with_a_state(
    images: ImageSet, tmp_path: Path, number: signal.Signals
) -> None:
    class StoppedError(Exception):
        pass

    def handle(number: int, frame: object) -> None:
        raise StoppedError

    before = signal.signal(number, handle)
    steps: list[int] = []

    def progress(done: int, total: int) -> None:
        steps.append(done // 12)
        if len(steps) == 2:
            os.kill(os.getpid(), number)

    try:
        with pytest.raises(StoppedError):
            _train(images, files=_states(tmp_path), on_progress=progress)
    finally:
        signal.signal(number, before)

    (state,) = _states(tmp_path).find()
    assert steps == [1, 2]
    assert ".step-00000003." in state.name


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_take_the_steps_of_one(images: ImageSet, on_ranks: Callable[..., list[Any]], world: int) -> None:
    _, alone = _train(images, dtype=torch.float64)

    for weights in on_ranks(_train_on_rank, images, world, world=world):
        assert _distance(alone, weights) < 1e-12


def _train_on_rank(images: ImageSet, world: int) -> dict[str, Tensor]:
    group = Group(rank=torch.distributed.get_rank(), world=world, local_rank=0, host="here")
    return _train(images, dtype=torch.float64, group=group)[1]


def test_loss_that_is_not_finite_ends_training_and_names_step_and_images(images: ImageSet) -> None:
    with pytest.raises(NumericalError, match=r"at step \d+ of 5 \(images \d/\d{4}\.png, ") as caught:
        _train(images, recipe=replace(_RECIPE, learning_rate=1e30, warmup_epochs=0))

    assert "finetune.learning_rate" in caught.value.hint


def test_state_that_is_not_finite_is_never_written(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(NumericalError):
        _train(
            images,
            recipe=replace(_RECIPE, learning_rate=1e30, warmup_epochs=0),
            files=_states(tmp_path),
            options=_SAVE_ALWAYS,
        )

    for path in _states(tmp_path).find():
        content = torch.load(path, weights_only=True)
        assert all(bool(item.isfinite().all()) for item in content["network"].values())


def test_weights_that_the_last_step_made_infinite_are_reported(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_module.take_step

    def overflow(training: Training, *arguments: Any) -> bool:
        stops = real(training, *arguments)
        training.model.trained["head.bias"].data.fill_(float("inf"))
        return stops

    monkeypatch.setattr(train_module, "take_step", overflow)

    with pytest.raises(NumericalError, match=r"1 weight is not finite after step 1 \(head\.bias\)"):
        _train(images, recipe=replace(_RECIPE, epochs=1, batch=20, warmup_epochs=0))


def test_disk_that_is_full_for_a_while_does_not_stop_training(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = train_module.write_state, []

    def refuse_once(*arguments: Any, **named: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise StoreError("could not write a state: No space left on device")
        real(*arguments, **named)

    monkeypatch.setattr(train_module, "write_state", refuse_once)

    _train(images, files=_states(tmp_path), options=_SAVE_ALWAYS)

    assert "training continues without a state after step 1" in caplog.text
    assert len(_states(tmp_path).find()) == 2


def test_disk_that_stays_full_ends_training_after_one_more_epoch(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def refuse(*arguments: Any, **named: Any) -> None:
        raise StoreError("could not write a state: No space left on device")

    monkeypatch.setattr(train_module, "write_state", refuse)

    with pytest.raises(StoreError, match="No space left"):
        _train(images, files=_states(tmp_path), options=_SAVE_ALWAYS,
               on_progress=lambda now, total: done.append(now // 12))  # fmt: skip

    assert done == [1, 2, 3, 4]  # two steps an epoch: the first refusal, one epoch, and the next


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(
    images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_module.compute_logits

    def refuse(model: FinetuneModel, pixels: Tensor, precision: str) -> Tensor:
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, pixels, precision)  # type: ignore[arg-type]

    _, expected = _train(images, dtype=torch.float64)
    monkeypatch.setattr(train_module, "compute_logits", refuse)

    result, weights = _train(images, dtype=torch.float64)

    assert result.micro_batch in (2, 4)
    assert _distance(weights, expected) < 1e-12


def test_memory_too_small_for_two_images_is_reported(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(train_module, "compute_logits", refuse)

    with pytest.raises(ResourceError, match="too small to train on two images"):
        _train(images)


def test_bf16_trains_float32_weights_to_about_the_same(images: ImageSet) -> None:
    exact, reduced = (_train(images, precision=precision) for precision in ("fp32", "bf16"))

    assert all(item.dtype == torch.float32 for item in reduced[1].values())
    assert reduced[0].mean_loss == pytest.approx(exact[0].mean_loss, rel=0.05)
    assert not _same(exact[1], reduced[1])


def test_head_starts_at_logistic_regression(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LogisticRegression

    model, labelled = _model(replace(_RECIPE, drop_path=0.0)), _labelled(images)
    seen: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    score_images(model, images, labelled.hashes, decoder="pillow", precision="fp32", options=_OPTIONS)
    handle.remove()
    rows = (seen[0] - seen[0].mean(dim=0)).double()
    rows = (rows / rows.norm(dim=1).mean()).numpy()
    reference = LogisticRegression(C=10.0, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(rows, labelled.labels)

    monkeypatch.setattr(predict_module, "_TARGET_GAP", 1e-9)
    train_module.init_head(model, labelled, l2=0.1, precision="fp32", options=_OPTIONS, group=ALONE)

    scores = score_images(model, images, labelled.hashes, decoder="pillow", precision="fp32", options=_OPTIONS)
    expected = torch.from_numpy(reference.predict_log_proba(rows))
    torch.testing.assert_close(scores.log_softmax(dim=1), expected, rtol=0, atol=2e-3)


def test_gradients_are_clipped(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[float] = []

    def build(model: FinetuneModel, recipe: FinetuneRecipe) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, recipe)
        gradients = [item for group in optimizer.param_groups for item in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *arguments: lengths.append(float(torch.nn.utils.get_total_norm([item.grad for item in gradients])))
        )
        return optimizer

    monkeypatch.setattr(train_module, "build_optimizer", build)
    _train(images, recipe=replace(_RECIPE, epochs=2, clip=0.01))
    clipped = list(lengths)
    lengths.clear()
    _train(images, recipe=replace(_RECIPE, epochs=2, clip=0.0))

    assert max(clipped) <= 0.01 * 1.0001
    assert min(lengths) > 0.01


def test_the_reported_loss_is_that_of_the_last_epoch(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[float, int]] = []
    real = train_module.take_step

    def take(training: Training, *arguments: Any) -> bool:
        stopped = real(training, *arguments)
        steps.append(training.loss)
        return stopped

    monkeypatch.setattr(train_module, "take_step", take)
    result, _ = _train(images)

    assert [count for _, count in steps] == [1, 2, 1, 2, 1]
    assert result.mean_loss == steps[-1][0]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_no_pair_of_a_batch_is_split_between_ranks(world: int) -> None:
    order = Order(images=20, batch=14, epochs=1, seed=0)
    groups = [Group(rank=rank, world=world, local_rank=rank, host="here") for rank in range(world)]
    shares = [train_module.own_rows(order, group) for group in groups]

    assert [row for rows in shares for row in rows] == list(range(14))
    assert all(rows.start % 2 == 0 for rows in shares)


@pytest.fixture
def jpegs(tmp_path: Path) -> ImageSet:
    """Return five JPEG files in two classes."""
    generator = np.random.default_rng(0)
    for number in range(5):
        folder = tmp_path / "val" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    return read_split(str(tmp_path), "val")


def _by_nvjpeg(images: ImageSet) -> Tensor:
    hashes = hash_images(images, cache_dir=None)
    options = RunOptions(micro_batch=2, workers=0)
    return score_images(_model(), images, hashes, decoder="nvjpeg", precision="fp32", options=options)


def test_images_that_the_device_decodes_are_scored_in_their_order(
    jpegs: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_module, "compute_logits", lambda model, pixels, precision: pixels.flatten(1))
    hashes = hash_images(jpegs, cache_dir=None)

    here = _by_nvjpeg(jpegs)

    there = score_images(
        _model(), jpegs, hashes, decoder="pillow", precision="fp32", options=RunOptions(micro_batch=2, workers=0)
    )
    assert float((here - there).abs().max()) < 0.03  # a level of 255, in units of std


def test_an_image_that_the_device_refuses_is_named(jpegs: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(batch: Sequence[object], transform: object, device: torch.device) -> tuple[Tensor, dict[int, str]]:
        return torch.zeros(len(batch), 16, 16, 3, dtype=torch.uint8), {len(batch) - 1: "torn"}

    monkeypatch.setattr(predict_module, "decode_on_device", refuse)

    with pytest.raises(DataError, match="3 images cannot be used") as caught:
        _by_nvjpeg(jpegs)

    names = [
        line.partition(": torn")[0].rpartition("/")[2] for line in str(caught.value).splitlines() if "torn" in line
    ]
    assert names == [jpegs.ids[row].partition("/")[2] for row in (1, 3, 4)]
