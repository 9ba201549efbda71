"""Settings of fine-tuning: ranges, records and shipped recipes."""

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
def test_recipe_is_rebuilt_from_the_settings_of_a_record(blocks: int | None) -> None:
    recipe = FinetuneRecipe(epochs=7, blocks=blocks, mixup=0.8)

    assert read_finetune_recipe({**recipe.settings, "seed": 5}) == recipe


def test_none_is_not_part_of_the_protocol() -> None:
    assert "blocks" not in FinetuneRecipe().settings


def test_section_of_a_file_sets_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "few.yaml"
    file.write_text("probe: [finetune]\nfinetune:\n  epochs: 7\n  learning_rate: 1e-4\n")

    config = read_config(EvaluationConfig, file=file, overrides=["finetune.epochs=8"])

    assert config.finetune == FinetuneRecipe(epochs=8, learning_rate=1e-4)


@pytest.mark.parametrize("path", sorted(_CONFIGS.glob("finetune*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_can_be_read_and_fine_tunes(path: Path) -> None:
    assert read_config(EvaluationConfig, file=path).probe == ["finetune"]
