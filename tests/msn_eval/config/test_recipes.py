"""The numbers of a fine-tuning: which are refused, and that a record gives all of them back."""

from pathlib import Path

import pytest

from msn_eval.config.recipes import FinetuneRecipe, read_finetune_recipe
from msn_eval.config.request import EvaluationConfig
from msn_eval.config.yaml_config import read_config
from msn_eval.errors import UsageError

_CONFIGS = Path(__file__).parents[3] / "configs" / "eval"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch", 0),
        ("blocks", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("layer_decay", 1.1),
        ("drop_path", 1.0),
        ("crop_share", 0.0),
        ("flip", 1.5),
        ("randaugment_magnitude", 11),
        ("warmup_epochs", 50),
    ],
)
def test_number_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"finetune\.{name}: .* is out of range"):
        FinetuneRecipe(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [None, 0, 3])
def test_settings_of_a_record_give_the_recipe_back(blocks: int | None) -> None:
    recipe = FinetuneRecipe(epochs=7, blocks=blocks, mixup=0.8)

    assert read_finetune_recipe({**recipe.settings, "seed": 5}) == recipe


def test_what_is_none_is_not_a_number_of_the_protocol() -> None:
    assert "blocks" not in FinetuneRecipe().settings


def test_section_of_a_file_is_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "few.yaml"
    file.write_text("probe: [finetune]\nfinetune:\n  epochs: 7\n  learning_rate: 1e-4\n")

    config = read_config(EvaluationConfig, file=file, overrides=["finetune.epochs=8"])

    assert config.finetune == FinetuneRecipe(epochs=8, learning_rate=1e-4)


def test_unknown_key_of_the_section_names_the_nearest_one(tmp_path: Path) -> None:
    file = tmp_path / "few.yaml"
    file.write_text("finetune:\n  learning_rat: 1e-4\n")

    with pytest.raises(UsageError, match=r"unknown key 'finetune.learning_rat'. Did you mean learning_rate\?"):
        read_config(EvaluationConfig, file=file)


def test_section_given_as_a_number_is_refused() -> None:
    with pytest.raises(UsageError, match="finetune"):
        read_config(EvaluationConfig, overrides=["finetune=3"])


@pytest.mark.parametrize("path", sorted(_CONFIGS.glob("finetune*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_can_be_read_and_fine_tunes(path: Path) -> None:
    assert read_config(EvaluationConfig, file=path).probe == ["finetune"]


def test_fp16_is_refused() -> None:
    with pytest.raises(UsageError, match="--precision fp16"):
        EvaluationConfig(probe=["finetune"], precision="fp16")


def test_hidden_patches_are_refused() -> None:
    with pytest.raises(UsageError, match="--patch-drop: fine-tuning uses all patches"):
        EvaluationConfig(probe=["finetune"], patch_drop=0.7)


def test_saving_without_training_is_refused() -> None:
    with pytest.raises(UsageError, match="--save: no network is trained"):
        EvaluationConfig(save="there")


def test_saving_what_was_trained_on_random_labels_is_refused() -> None:
    with pytest.raises(UsageError, match="with --canary nothing is written"):
        EvaluationConfig(probe=["finetune"], save="there", canary=True)
