"""Linear layers on augmented images: the step does not depend on how a batch is cut, nor the result on interruptions."""

import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from msn_eval import extract, load_encoder
from msn_eval.cli import main
from msn_eval.data import read_split
from msn_eval.distributed.group import ALONE, Group
from msn_eval.errors import NumericalError, ResourceError, StoreError
from msn_eval.features import augmented as augmented_features
from msn_eval.features.augmented import AugmentedImages, Chunk, iterate_augmented_features
from msn_eval.features.encoder import Encoder
from msn_eval.features.extraction import Loading
from msn_eval.probes import linear_augmented
from msn_eval.probes.base import FittedProbe
from msn_eval.probes.linear_augmented import (
    LinearAugmented,
    Training,
    draw_order,
    fit_augmented,
    start_training,
    take_step,
)
from msn_eval.probes.training_state import StateFiles, write_state
from msn_eval.process import StopRequest
from msn_eval.results.folder import list_results

CPU = torch.device("cpu")
_PROBE = LinearAugmented(lr=[0.5, 4.0], epochs=3, batch_size=16)


@pytest.fixture(scope="module")
def images() -> AugmentedImages:
    """Return four digits of each class as raw pixels."""
    drawn = read_split("digits", "train").first_of_each_class(4)
    return AugmentedImages(
        images=drawn,
        labels=torch.tensor(drawn.labels),
        hashes=None,
        encoder=load_encoder("pixels", device="cpu"),
        tap="pixels",
        loading=Loading(batch_size=6, workers=0),
    )


def _fit(images: AugmentedImages, probe: LinearAugmented = _PROBE, files: StateFiles | None = None) -> FittedProbe:
    return fit_augmented(probe, images, group=ALONE, files=files)


def _batch(n: int = 20, d: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.arange(n) % 3


def _chunk(features: Tensor, labels: Tensor, error: NumericalError | None = None) -> Chunk:
    def check() -> None:
        if error is not None:
            raise error

    return features, labels, check


def _stepped(cuts: list[int], probe: LinearAugmented = _PROBE, steps: int = 3) -> Training:
    training = start_training(probe, 8, 3, CPU)
    features, labels = _batch()
    for step in range(steps):
        parts = map(_chunk, torch.split(features, cuts), torch.split(labels, cuts))
        assert take_step(training, parts, images=20, rate_factor=1 - step / 4, group=ALONE, stop=StopRequest())
    return training


def _weights(training: Training) -> dict[str, Tensor]:
    return {
        f"{rate} {name}": value for rate, head in training.heads.items() for name, value in head.state_dict().items()
    }


class _ReleasedSteps:
    """The update of the released linear evaluation: v = 0.9 v - lr (g + decay w), w += 0.9 v - lr (g + decay w).

    The learning rate is inside the momentum v, unlike in torch's SGD; the two differ where it changes. Source:
    github.com/facebookresearch/msn, src/sgd.py, with Nesterov momentum.
    """

    def __init__(self, n_features: int, first: Tensor, decay: float = 0.0) -> None:
        self.norm, self.linear = torch.nn.LayerNorm(n_features), torch.nn.Linear(n_features, len(first))
        self.linear.load_state_dict({"weight": first, "bias": torch.zeros(len(first))})
        self.weights = [*self.norm.parameters(), self.linear.bias, self.linear.weight]
        self.decays = [0.0, 0.0, 0.0, decay]
        self.velocities = [torch.zeros_like(weight) for weight in self.weights]

    def scores(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.linear(functional.normalize(self.norm(features), dim=1)))

    def step(self, features: Tensor, labels: Tensor, rate: float) -> None:
        gradients = torch.autograd.grad(functional.cross_entropy(self.scores(features), labels), self.weights)
        with torch.no_grad():
            for weight, gradient, velocity, decay in zip(
                self.weights, gradients, self.velocities, self.decays, strict=True
            ):
                change = -rate * (gradient + decay * weight)
                velocity.mul_(0.9).add_(change)
                weight.add_(change + 0.9 * velocity)


def test_a_step_is_that_of_the_released_code_on_the_complete_batch() -> None:
    probe = replace(_PROBE, lr=[2.0], weight_decay=0.1)
    features, labels = _batch()
    released = _ReleasedSteps(8, start_training(probe, 8, 3, CPU).heads[2.0].linear.weight, decay=0.1)
    for step in range(3):
        released.step(features, labels, 2.0 * (1 - step / 4))

    head = _stepped([20], probe).heads[2.0]

    torch.testing.assert_close(head.linear.weight, released.linear.weight)
    torch.testing.assert_close(head.linear.bias, released.linear.bias)
    torch.testing.assert_close(head.norm.weight, released.norm.weight)
    torch.testing.assert_close(head.norm.bias, released.norm.bias)


def test_predictions_after_100_steps_are_those_of_the_released_code_on_the_same_crops() -> None:
    encoder, probe = load_encoder("pixels", device="cpu"), replace(_PROBE, lr=[6.4], epochs=20, batch_size=20)
    drawn = read_split("digits", "train").first_of_each_class(11)
    labels, loading = torch.tensor(drawn.labels), Loading(batch_size=20, workers=0)
    images = AugmentedImages(images=drawn, labels=labels, hashes=None, encoder=encoder, tap="pixels", loading=loading)
    released = _ReleasedSteps(images.dim, start_training(probe, images.dim, 10, CPU).heads[6.4].linear.weight)
    for epoch in range(20):
        batches = torch.split(draw_order(110, seed=0, epoch=epoch), 20)[:5]  # the last 10 images do not fill a batch
        steps = iterate_augmented_features(images, labels, batches, seed=0, epoch=epoch, share=0.08, group=ALONE)
        for number, ((features, own, _),) in enumerate(steps):
            released.step(features, own, 6.4 * (1 + math.cos(math.pi * (5 * epoch + number) / 100)) / 2)
    values = extract(encoder, "digits", split="val").values

    (scores,) = _fit(images, probe).scores(values)

    assert (scores.argmax(dim=1) != released.scores(values).argmax(dim=1)).sum() <= 2


@pytest.mark.parametrize(("batch_size", "steps"), [(20, 2), (16, 2), (39, 1), (40, 1), (41, 1), (16384, 1)])
def test_an_epoch_ends_with_its_last_full_batch_and_has_at_least_one_step(
    images: AugmentedImages, batch_size: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def take(training: Training, chunks: Iterator[Chunk], *, images: int, **named: Any) -> bool:
        batches.append(images)
        return take_step(training, chunks, images=images, **named)

    monkeypatch.setattr(linear_augmented, "take_step", take)
    _fit(images, replace(_PROBE, epochs=3, batch_size=batch_size))

    assert batches == [min(batch_size, 40)] * 3 * steps


def test_a_batch_larger_than_the_labelled_images_is_mentioned(
    images: AugmentedImages, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        _fit(images, replace(_PROBE, epochs=1, batch_size=41))
        _fit(images, replace(_PROBE, epochs=1, batch_size=40))

    assert caplog.text.count("every step is on all 40 images, fewer than a batch of 41") == 1
    assert caplog.text.count("every step is on all") == 1


@pytest.mark.parametrize("cuts", [[1] * 20, [7, 13], [6, 6, 6, 2]], ids=str)
def test_accumulated_and_direct_batches_give_the_same_step(cuts: list[int]) -> None:
    torch.testing.assert_close(_weights(_stepped(cuts)), _weights(_stepped([20])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 3])
def test_first_weights_are_drawn_by_the_seed_and_equal_for_all_rates(seed: int) -> None:
    expected = torch.empty(3, 8).normal_(0.0, 0.01, generator=torch.Generator().manual_seed(seed))

    for head in start_training(replace(_PROBE, seed=seed), 8, 3, CPU).heads.values():
        assert torch.equal(head.linear.weight, expected)
        assert not head.linear.bias.any()


def test_a_restored_training_equals_the_saved_one() -> None:
    probe = replace(_PROBE, lr=[0.5, 9.0, 4.0])
    training = _stepped([20], probe)
    training.last_losses = {0.5: 1.25, 9.0: 2.0, 4.0: 1.5}
    del training.heads[9.0], training.optimizers[9.0]
    training.diverged_at = {9.0: 2}

    restored = start_training(probe, 8, 3, CPU)
    restored.load_state_dict({**training.state_dict(), "step": training.step})

    assert (restored.step, restored.diverged_at) == (3, {9.0: 2})
    assert (restored.losses, restored.last_losses) == (training.losses, training.last_losses)
    assert list(restored.heads) == list(restored.optimizers) == [0.5, 4.0]
    torch.testing.assert_close(_weights(restored), _weights(training), rtol=0, atol=0)


def test_features_that_are_not_finite_are_reported_before_a_step() -> None:
    features, labels = _batch()
    bad = _chunk(
        features.masked_fill(features > 2, torch.inf), labels, NumericalError("features of a.png are not finite")
    )
    training = start_training(_PROBE, 8, 3, CPU)

    with pytest.raises(NumericalError, match=r"features of a\.png"):
        take_step(training, iter([_chunk(*_batch()), bad]), images=40, rate_factor=1.0, group=ALONE, stop=StopRequest())
    assert training.step == 0


def test_a_disk_that_refused_is_tried_again_after_a_while(
    files: StateFiles, full_disk: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_augmented, "_SAVE_SECONDS", 60.0)
    now = [100.0]
    monkeypatch.setattr(linear_augmented, "time", SimpleNamespace(monotonic=lambda: now[0]))
    full_disk["left"] = 10
    keeper = linear_augmented._StateSaver(files=files, saved_at=0.0)
    left = []
    for now[0] in (100.0, 101.0, 159.0, 161.0):
        keeper.save_if_due(_stepped([20], steps=1))
        left.append(full_disk["left"])

    assert left == [9, 9, 9, 8]


def test_learning_rates_fall_along_half_a_cosine_over_all_epochs(
    images: AugmentedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def take(training: Training, *given: Any, rate_factor: float, **named: Any) -> bool:
        shares.append(rate_factor)
        return take_step(training, *given, rate_factor=rate_factor, **named)

    monkeypatch.setattr(linear_augmented, "take_step", take)
    fitted = _fit(images, replace(_PROBE, epochs=2, batch_size=20))

    assert [one.iterations for one in fitted.settings] == [4, 4]
    assert shares == pytest.approx([1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])


def test_the_objective_is_the_mean_loss_of_the_last_epochs_batches(images: AugmentedImages) -> None:
    probe = replace(_PROBE, epochs=2, batch_size=40)
    training = start_training(probe, images.dim, 10, CPU)
    losses = []
    for epoch in range(2):
        order = draw_order(40, seed=0, epoch=epoch)
        (parts,) = iterate_augmented_features(
            images, images.labels, [order], seed=0, epoch=epoch, share=0.08, group=ALONE
        )
        features, labels = (torch.cat(column) for column in list(zip(*parts, strict=True))[:2])
        losses = [functional.cross_entropy(head(features), labels).item() for head in training.heads.values()]
        share = (1.0, 0.5)[epoch]
        take_step(
            training, iter([_chunk(features, labels)]), images=40, rate_factor=share, group=ALONE, stop=StopRequest()
        )

    fitted = _fit(images, probe)

    assert [one.objective for one in fitted.settings] == pytest.approx(losses, rel=1e-5)


def test_layers_trained_together_are_those_trained_alone() -> None:
    together = _weights(_stepped([20]))

    for rate in _PROBE.lr:
        alone = _weights(_stepped([20], replace(_PROBE, lr=[rate])))
        torch.testing.assert_close(alone, {name: together[name] for name in alone}, rtol=0, atol=0)


def _rank_group() -> Group:
    rank = torch.distributed.get_rank()
    return Group(rank=rank, world=2, local_rank=rank, host="here")


def _step_on_a_rank() -> dict[str, Tensor]:
    group, training, (features, labels) = _rank_group(), start_training(_PROBE, 8, 3, CPU), _batch()
    rows = slice(0, 13) if group.rank == 0 else slice(13, 20)
    for step in range(3):
        chunks = iter([_chunk(features[rows], labels[rows])])
        take_step(training, chunks, images=20, rate_factor=1 - step / 4, group=group, stop=StopRequest())
    return _weights(training)


def test_ranks_take_the_step_of_one_process(on_ranks: Callable[..., list[Any]]) -> None:
    first, second = on_ranks(_step_on_a_rank)

    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, _weights(_stepped([20])), rtol=0, atol=1e-6)


def _stop_one_rank() -> tuple[bool, int]:
    group, training = _rank_group(), start_training(_PROBE, 8, 3, CPU)
    stop = StopRequest(number=signal.SIGTERM if group.rank == 1 else None)
    chunks = iter([_chunk(*_batch())])
    return take_step(training, chunks, images=40, rate_factor=1.0, group=group, stop=stop), training.step


def test_no_rank_takes_a_step_if_one_is_asked_to_stop(on_ranks: Callable[..., list[Any]]) -> None:
    assert on_ranks(_stop_one_rank) == [(False, 0), (False, 0)]


def _step_with_bad_features_on_one_rank() -> str:
    group, training, (features, labels) = _rank_group(), start_training(_PROBE, 8, 3, CPU), _batch()
    chunk = _chunk(features, labels)
    if group.rank == 1:
        chunk = _chunk(features * torch.inf, labels, NumericalError("features of a.png are not finite"))
    try:
        take_step(training, iter([chunk]), images=40, rate_factor=1.0, group=group, stop=StopRequest())
    except NumericalError as error:
        return str(error)
    return "no error"


def test_features_that_are_not_finite_on_one_rank_end_the_step_on_all(on_ranks: Callable[..., list[Any]]) -> None:
    first, second = on_ranks(_step_with_bad_features_on_one_rank)

    assert "another rank's" in first
    assert "a.png" in second


def test_a_layer_that_diverges_is_left_out_and_changes_no_other(
    images: AugmentedImages, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        wild = _fit(images, replace(_PROBE, lr=[3e38, 4.0]))
    calm = _fit(images, replace(_PROBE, lr=[4.0]))

    ((params, reason),) = wild.failures
    assert params["lr"] == 3e38
    assert "diverged at learning rate 3e+38, step" in str(reason)
    assert "learning rate 3e+38 diverged" in caplog.text
    assert [one.params["lr"] for one in wild.settings] == [4.0]
    (kept,), (expected,) = (list(one.scores(_pixels(images))) for one in (wild, calm))
    assert torch.equal(kept, expected)


def _pixels(images: AugmentedImages) -> Tensor:
    return torch.linspace(0, 1, 5 * images.dim).view(5, -1).sin()


def test_if_every_layer_diverges_the_fit_fails(images: AugmentedImages) -> None:
    with pytest.raises(NumericalError, match=r"the layer diverged at learning rate 3e\+38"):
        _fit(images, replace(_PROBE, lr=[3e38]))


def _features(images: AugmentedImages, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    result = iterate_augmented_features(images, images.labels, batches, seed=3, epoch=1, share=0.3, group=ALONE)
    return [(features, labels) for parts in result for features, labels, _ in parts]


def test_an_epoch_entered_late_has_the_features_that_it_would_have_had(images: AugmentedImages) -> None:
    batches = list(torch.split(draw_order(40, seed=3, epoch=1), 16))

    whole, late = _features(images, batches), _features(images, batches[1:])

    assert [len(labels) for _, labels in whole] == [6, 6, 4, 6, 6, 4, 6, 2]
    for (features, labels), (others, their) in zip(whole[3:], late, strict=True):
        assert torch.equal(features, others)
        assert torch.equal(labels, their)


def test_workers_change_no_feature(images: AugmentedImages) -> None:
    batches = list(torch.split(draw_order(40, seed=3, epoch=1), 16))

    here = _features(images, batches)
    by_workers = _features(replace(images, loading=Loading(batch_size=6, workers=2)), batches)

    assert all(torch.equal(one[0], other[0]) for one, other in zip(here, by_workers, strict=True))


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Return a function that limits the encoder to so many images at once; it returns the sizes of all attempts."""

    def leave(room: int) -> list[int]:
        tried: list[int] = []

        def encode(encoder: Encoder, pixels: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
            tried.append(len(pixels))
            if len(pixels) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(encoder, pixels, taps)

        whole = augmented_features.encode
        monkeypatch.setattr(augmented_features, "encode", encode)
        return tried

    return leave


def test_on_out_of_memory_the_encoder_halves_its_batches_and_no_number_changes(
    images: AugmentedImages, small_memory: Callable[[int], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    batches = list(torch.split(draw_order(40, seed=3, epoch=1), 16))
    whole, fitted = _features(images, batches), _fit(images)

    tried = small_memory(2)
    halved = _features(images, batches)

    assert tried[:6] == [6, 3, 1, 1, 1, 1]
    assert max(tried[2:]) == 1  # what memory had no room for once is not tried again
    assert caplog.text.count("continuing with") == 2
    assert [len(labels) for _, labels in halved] == [len(labels) for _, labels in whole]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(halved, whole, strict=True))
    again = _fit(images)
    assert [one.objective for one in again.settings] == [one.objective for one in fitted.settings]


def test_memory_too_small_for_one_image_is_reported(
    images: AugmentedImages, small_memory: Callable[[int], list[int]]
) -> None:
    small_memory(0)

    with pytest.raises(ResourceError, match="one image does not fit into the memory of cpu"):
        _fit(images)


def test_orders_are_permutations_that_differ_from_epoch_to_epoch() -> None:
    orders = [draw_order(50, seed=1, epoch=epoch).tolist() for epoch in range(3)]

    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert draw_order(50, seed=2, epoch=0).tolist() not in orders


@pytest.fixture
def files(tmp_path: Path) -> StateFiles:
    return StateFiles(out=tmp_path, facts={"training": "one"})


def _killed_at(step: int) -> Callable[..., bool]:
    def take(training: Training, *arguments: Any, **others: Any) -> bool:
        if training.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(training, *arguments, **others)

    return take


def test_a_killed_training_resumes_to_the_same_bits(
    images: AugmentedImages, files: StateFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = _fit(images)
    child = os.fork()
    if child == 0:
        try:
            linear_augmented._SAVE_SECONDS = 0.0
            linear_augmented.take_step = _killed_at(5)
            _fit(images, files=files)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL

    with caplog.at_level(logging.INFO):
        resumed = _fit(images, files=files)

    assert "resumes after step 5" in caplog.text  # in the middle of the third epoch of two steps
    assert [one.objective for one in resumed.settings] == [one.objective for one in undisturbed.settings]
    pixels = _pixels(images)
    pairs = zip(resumed.scores(pixels), undisturbed.scores(pixels), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_command_asked_to_stop_ends_with_75_and_resumes_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", "pixels", "--data", "digits", "--subset", "2imgs@1", "--probe", "linear-augmented"]
    words += ["--device", "cpu", "--no-cache", "--json", "linear_augmented.epochs=4", "linear_augmented.batch_size=8"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    stopped_at: list[int] = []

    def stop_once(training: Training, *arguments: Any, **others: Any) -> bool:
        if training.step == 4 and not stopped_at:
            stopped_at.append(training.step)
            signal.raise_signal(signal.SIGTERM)
        return take_step(training, *arguments, **others)

    monkeypatch.setattr(linear_augmented, "take_step", stop_once)
    out = tmp_path / "stopped"
    assert main([*words, "--out", str(out)]) == 75
    assert [path.name.split(".")[1] for path in (out / ".training").iterdir()] == ["step-00000004"]
    assert list(out.glob("*.json")) == []

    assert main([*words, "--out", str(out)]) == 0

    assert "resumes after step 4" in capsys.readouterr().err
    (whole,), (resumed,) = list_results([tmp_path / "whole"]), list_results([out])
    assert (resumed.id, resumed.metrics, resumed.probe) == (whole.id, whole.metrics, whole.probe)
    assert not (out / ".training").exists()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Make the disk refuse as many states as `left` says, and save at every step."""
    left = {"left": 0}

    def write(files: StateFiles, state: dict[str, Any], *, step: int) -> None:
        if left["left"]:
            left["left"] -= 1
            raise StoreError("disk full", where=str(files.folder))
        write_state(files, state, step=step)

    monkeypatch.setattr(linear_augmented, "write_state", write)
    monkeypatch.setattr(linear_augmented, "_SAVE_SECONDS", 0.0)
    return left


def test_a_disk_that_is_full_for_a_moment_does_not_stop_a_training(
    images: AugmentedImages, files: StateFiles, full_disk: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    full_disk["left"] = 2

    fitted = _fit(images, files=files)

    assert len(fitted.settings) == 2
    assert caplog.text.count("disk full") == 2
    assert files.find()


def test_a_disk_that_stays_full_stops_a_training_before_the_next_epoch(
    images: AugmentedImages, files: StateFiles, full_disk: dict[str, int]
) -> None:
    full_disk["left"] = 1000

    with pytest.raises(StoreError, match="disk full"):
        _fit(images, files=files)

    assert full_disk["left"] == 1000 - 3  # two steps of the first epoch, and its end


def test_a_class_without_labelled_images_is_never_predicted(images: AugmentedImages) -> None:
    few = images.images.only([one for one in images.images.ids if not one.startswith("3/")])
    probe = replace(images, images=few, labels=torch.tensor(few.labels))

    for scores in _fit(probe).scores(_pixels(images)):
        assert (scores[:, 3] == -torch.inf).all()
        assert scores[:, [0, 1, 2, 4, 5, 6, 7, 8, 9]].isfinite().all()


def test_each_learning_rate_is_a_protocol_with_every_field_in_it() -> None:
    first, second = _PROBE.configs(9)

    assert (first["lr"], second["lr"]) == (0.5, 4.0)
    changed = {"weight_decay": 0.1, "epochs": 4, "batch_size": 17, "crop_share": 0.3, "seed": 1}
    for name, value in changed.items():
        assert replace(_PROBE, **{name: value}).configs(9)[0] != first, name


def test_the_global_generators_are_unchanged(images: AugmentedImages) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()

    _fit(images)

    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
