"""Fine-tuning as part of an evaluation: its records, interruptions, and the network that is saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from msn_eval import evaluate
from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.cli import main
from msn_eval.errors import CheckpointError, DataError, UsageError
from msn_eval.evaluation import finetune as finetuning
from msn_eval.features.encoder import build_encoder, normalise_pixels
from msn_eval.probes.finetune import train as finetune_module
from msn_eval.results.record import Result, read_predictions

_VIT = "random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2"
_RECIPE = {"epochs": 2, "batch": 8, "warmup_epochs": 0, "learning_rate": 1e-3, "flip": 0.0}
Tune = Callable[..., list[Result]]


@pytest.fixture
def tune(tmp_path: Path) -> Tune:
    """Return a function that fine-tunes a small network on a draw of the digits, with changes to recipe and options."""

    def run(
        checkpoint: str = _VIT, *, subset: str = "1img@1", recipe: dict[str, object] | None = None, **options: Any
    ) -> list[Result]:
        given = {"data": "digits", "out": tmp_path / "runs", "device": "cpu", "no_cache": True, "limit": 4} | options
        return evaluate([checkpoint], subsets=[subset], probes=["finetune"], finetune=_RECIPE | (recipe or {}), **given)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return an image folder of three classes, the third of which has only validation images."""
    root = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        for split in ("train", "val")[name == "c" :]:
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 255, (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


_PHOTOS: dict[str, Any] = {"subset": "full", "limit": None, "allow_class_mismatch": True}


def test_record_states_every_number_of_the_recipe(tune: Tune) -> None:
    (result,) = tune(recipe={"blocks": 1}, seed=3)

    assert result.status == "ok"
    assert result.protocol["probe"] == {"name": "finetune", "version": 1, "params": dict(result.probe.params)}
    assert (result.probe.params["blocks"], result.probe.params["seed"], result.probe.params["epochs"]) == (1, 3, 2)
    assert (result.probe.solver, result.probe.iterations, result.features.tap) == ("adamw", 3, "cls-norm")
    assert result.metrics is not None
    assert result.metrics.n == 40


@pytest.mark.parametrize("change", [{"recipe": {"erase": 0.5}}, {"recipe": {"blocks": 0}}, {"seed": 1}], ids=str)
def test_another_number_is_another_protocol(tune: Tune, change: dict[str, Any]) -> None:
    (one,), (other,) = tune(), tune(**change)

    assert one.protocol_id != other.protocol_id


def test_options_of_speed_change_no_prediction(tune: Tune, tmp_path: Path) -> None:
    ranks = []
    for name, options in (("one", {}), ("two", {"batch_size": "2"}), ("three", {"workers": "2"})):
        (result,) = tune(out=tmp_path / name, **options)
        ranks.append(read_predictions(tmp_path / name / f"{result.id}.npz").rank_of_label.tolist())

    assert ranks[1:] == ranks[:1] * 2


def test_finished_plan_is_not_computed_again(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = tune()
    monkeypatch.setattr(finetuning, "finetune_task", lambda *given, **named: pytest.fail("it was computed again"))

    assert tune() == [before]


def test_states_are_gone_when_the_record_is_written(tune: Tune, tmp_path: Path) -> None:
    (result,) = tune()

    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [f"{result.id}.json", f"{result.id}.npz"]


def test_killed_evaluation_resumes_to_the_same_record(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def kill(*given: object, **named: object) -> None:
        raise KilledError

    (undisturbed,) = tune(out=tmp_path / "other")
    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "score_images", kill)
        with pytest.raises(KilledError):
            tune()
    states = list((tmp_path / "runs" / ".training").iterdir())
    monkeypatch.setattr(finetune_module, "take_step", lambda *given: pytest.fail("it was trained again"))

    (result,) = tune()

    assert len(states) == 1
    assert (result.id, result.metrics, result.probe) == (undisturbed.id, undisturbed.metrics, undisturbed.probe)


def test_command_whose_loss_is_not_finite_ends_with_23(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"finetune.{name}={value}" for name, value in (_RECIPE | {"learning_rate": 1e30}).items()]
    code = main(
        ["--checkpoint", _VIT, "--data", "digits", "--probe", "finetune", "--subset", "1img@1", "--limit", "2",
         "--device", "cpu", "--no-cache", "--out", str(tmp_path), *given]
    )  # fmt: skip

    output = capsys.readouterr()
    (record,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert (code, record["status"], record["metrics"], record["predictions"]) == (23, "failed", None, None)
    assert "the loss is nan at step" in record["error"]
    assert "FAILED" in output.out
    assert "Use a smaller finetune.learning_rate" in output.err


def test_class_without_labelled_images_is_never_predicted(
    tune: Tune, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "score_images", lambda *given, **named: torch.tensor([[0.0, 1.0, 9.0]] * 12))

    (result,) = tune(data=str(photos), **_PHOTOS)

    answers = read_predictions(tmp_path / "runs" / f"{result.id}.npz")
    assert set(answers.prediction.tolist()) == {1}
    assert answers.rank_of_label[answers.label == 2].tolist() == [3, 3, 3, 3]


def test_labelled_images_of_a_single_class_fail(tune: Tune, photos: Path, tmp_path: Path) -> None:
    shutil.rmtree(photos / "train" / "b")

    (result,) = tune(data=str(photos), **_PHOTOS)

    assert result.status == "failed"
    assert "are of a single class" in str(result.error)


def test_damaged_images_of_both_splits_are_listed_before_anything_is_trained(
    tune: Tune, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = [photos / "train" / "a" / "1.png", photos / "val" / "c" / "2.png"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:60])
    monkeypatch.setattr(finetuning, "finetune", lambda *given, **named: pytest.fail("it was trained"))

    with pytest.raises(DataError) as caught:
        tune(data=str(photos), **_PHOTOS)

    assert all(str(path) in str(caught.value) for path in damaged)


def test_random_labels_do_not_carry_over_to_other_images(tune: Tune, tmp_path: Path) -> None:
    (result,) = tune(subset="5imgs@1", recipe={"epochs": 5}, limit=20, canary=True)

    assert result.metrics is not None
    assert result.metrics.top1 < 0.25
    assert not (tmp_path / "runs").exists()


def test_fine_tuned_and_frozen_numbers_have_columns_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from msn_eval.results.table import make_table

    results = [
        one
        for epochs in (1, 2)
        for one in evaluate(
            [_VIT], data="digits", subsets=["1img@1"], probes=["finetune", "logistic"], out=tmp_path, device="cpu",
            no_cache=True, limit=2, finetune=_RECIPE | {"epochs": epochs},
        )
    ]  # fmt: skip

    groups = list(make_table(results).groups())

    assert groups == [
        "logistic on digits, 2 validation images per class",
        "finetune on digits, 2 validation images per class, 1 epoch",
        "finetune on digits, 2 validation images per class, 2 epochs",
    ]
    assert main(["verify", str(tmp_path)]) == 0
    assert "3 records" in capsys.readouterr().out


def test_baseline_is_measured_again_with_its_own_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", _VIT, "--data", "digits", "--device", "cpu", "--no-cache"]
    given = [f"finetune.{name}={value}" for name, value in _RECIPE.items()]
    runs, baseline = str(tmp_path / "runs"), str(tmp_path / "baseline.json")
    assert main([*arguments, "--probe", "finetune", "--subset", "1img@1", "--seed", "2", "--out", runs, *given]) == 0
    assert main(["baseline", runs, "--out", baseline]) == 0
    capsys.readouterr()

    code = main(["check", "--baseline", baseline, *arguments, "--seed", "2", "--out", str(tmp_path / "again")])

    assert code == 0
    assert "pass" in capsys.readouterr().out.lower()


# The network that is saved.


def test_saved_folder_names_its_result_and_classes(tune: Tune, tmp_path: Path) -> None:
    (result,) = tune(save=str(tmp_path / "saved"))

    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["ViTMSNForImageClassification"]
    assert (config["msn_eval_result"], config["id2label"]["3"], config["label2id"]["3"]) == (result.id, "3", 3)


_LAYOUTS = {
    "msn": (_VIT, "ViTMSNForImageClassification", None),
    "dinov2": ("random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2&init_values=0.1",
               "Dinov2ForImageClassification", None),
    "dinov2 mean": ("random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2&init_values=0.1",
                    "Dinov2ForImageClassification", "mean"),
    "ijepa": ("random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2"
              "&class_token=False&global_pool='avg'&fc_norm=False", "IJepaForImageClassification", None),
}  # fmt: skip


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_transformers_computes_the_logits_of_the_network_that_was_scored(
    tune: Tune, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    name, kind, tap = _LAYOUTS[layout]
    trained: list[Any] = []
    real = finetuning.build_finetune_model
    monkeypatch.setattr(
        finetuning, "build_finetune_model", lambda *given, **named: trained.append(real(*given, **named)) or trained[-1]
    )
    tune(name, save=str(tmp_path / "saved"), tap=tap)
    encoder = build_encoder(read_checkpoint(name), device=torch.device("cpu"), precision="fp32")
    pixels = normalise_pixels(torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8), encoder)

    loaded, info = getattr(transformers, kind).from_pretrained(tmp_path / "saved", output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        expected = trained[-1].network(pixels)
        torch.testing.assert_close(loaded.eval()(pixels).logits, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 1e-3


def test_saved_folder_is_a_checkpoint_of_its_own(tune: Tune, tmp_path: Path) -> None:
    (result,) = tune(save=str(tmp_path / "saved"))

    saved = read_checkpoint(str(tmp_path / "saved"))

    assert saved.params == result.checkpoint.params
    assert saved.weights_sha256 != result.checkpoint.weights_sha256


def test_each_draw_is_saved_to_a_folder_of_its_own(tune: Tune, tmp_path: Path) -> None:
    tune(subset="1img", recipe={"epochs": 1}, save=str(tmp_path / "saved"))

    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["1img-1", "1img-2", "1img-3"]


def test_folder_that_holds_something_else_is_refused_before_training(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine.txt").write_text("keep")
    monkeypatch.setattr(finetuning, "finetune", lambda *given, **named: pytest.fail("it was trained"))

    with pytest.raises(UsageError, match="save: something else exists there already"):
        tune(save=str(tmp_path / "saved"))


def test_network_that_transformers_lacks_is_refused_before_training(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetuning, "finetune", lambda *given, **named: pytest.fail("it was trained"))

    with pytest.raises(CheckpointError, match="cannot be written for transformers"):
        tune(_VIT, tap="mean", save=str(tmp_path / "saved"))


def test_finished_result_whose_network_was_not_kept_is_refused(tune: Tune, tmp_path: Path) -> None:
    (result,) = tune()

    with pytest.raises(UsageError, match=rf"save: {result.id} is measured already"):
        tune(save=str(tmp_path / "saved"))


def test_saved_network_of_a_finished_result_is_unchanged(tune: Tune, tmp_path: Path) -> None:
    tune(save=str(tmp_path / "saved"))
    before = (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns

    tune(save=str(tmp_path / "saved"))

    assert (tmp_path / "saved" / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """Return a folder with a network that transformers runs."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


@pytest.mark.parametrize("last", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("checkpoint", "given", "text"),
    [
        ("clip", [], "transformers runs clip"),
        (_VIT, ["finetune.blocks=99"], "blocks, not 99"),
        (_VIT, ["--save", "full"], "--save: something else exists there already"),
    ],
    ids=["network of transformers", "too many blocks", "folder that holds something else"],
)
def test_run_and_dry_run_refuse_alike_before_anything_is_computed(
    checkpoint: str,
    given: list[str],
    text: str,
    last: list[str],
    clip: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    command = ["--checkpoint", clip if checkpoint == "clip" else checkpoint, "--data", "digits", "--subset", "1img@1"]

    code = main([*command, "--probe", "ncm,finetune", "--device", "cpu", "--no-cache", *last, *given])

    assert (code, text in capsys.readouterr().err) == (2, True)
    assert not (tmp_path / "runs").exists()
