"""Recipes from YAML and overrides, and those that ship."""

from pathlib import Path

import pytest

from msn_eval.errors import UsageError
from msn_eval.files.package_data import shipped_folder
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import outline_network
from msn_pretrain.config.load import read_recipe, recipe_as_yaml
from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe

_SHIPPED = sorted((shipped_folder("configs") / "pretrain").glob("*.yaml"))


def recipe_of(folder: Path, text: str, *overrides: str) -> MSNRecipe | SimSiamRecipe:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return read_recipe(file, overrides=overrides)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "optimization:\n  epochs: 3\n  batch_size: 8\n", "optimization.epochs=5")

    assert (recipe.optimization.epochs, recipe.optimization.batch_size, recipe.optimization.warmup) == (5, 8, 15)


def test_a_number_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "optimization:\n  learning_rate: 1e-3\n", "optimization.final_learning_rate=1e-7")

    assert (recipe.optimization.learning_rate, recipe.optimization.final_learning_rate) == (1e-3, 1e-7)


def test_a_folder_may_be_called_by_a_number(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, "method: msn", "run.dir=007").run.dir == "007"


def test_method_decides_which_recipe_is_read(tmp_path: Path) -> None:
    assert isinstance(recipe_of(tmp_path, "method: simsiam"), SimSiamRecipe)
    assert isinstance(recipe_of(tmp_path, "run:\n  seed: 1"), MSNRecipe)


def test_a_recipe_written_out_reads_back_equal(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, "views:\n  crop_scale: [0.4, 1]\n", "watch.probes=[knn,ridge]", "criterion.prior=power_law"
    )

    assert recipe_of(tmp_path, recipe_as_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.epoch=3", "unknown key 'optimization.epoch'. Did you mean optimization.epochs?"),
        ("epochs=3", "unknown key 'epochs'. Did you mean optimization.epochs?"),
        ("optmization.epochs=3", "unknown key 'optmization'. Did you mean optimization?"),
        ("optimization.epochs=many", "optimization.epochs: Value 'many'"),
        ("optimization.epochs=0", "optimization.epochs: 0 is out of range"),
        ("optimization.epochs", "is not of the form key=value"),
        ("views.crop_scale=[0.3]", "views.crop_scale: [0.3] are not two numbers"),
        ("views=3", "views is a section, not a value"),
        ("run.dir={", "the value is no YAML"),
        ("method=mns", "method 'mns'. Did you mean msn?"),
        ("run.seed.more=1", "run.seed"),
    ],
)
def test_an_override_that_cannot_be_meant_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of(tmp_path, "method: msn", override)

    assert message in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("text", ["- 1\n", "run: {", "\tx", "run: &a\n  dir: *b\n"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of(tmp_path, text)

    assert str(tmp_path / "recipe.yaml") in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        read_recipe(tmp_path / "nothing.yaml")


def test_all_promised_recipes_ship() -> None:
    msn = (
        "vits16",
        "vits16_headline",
        "vitb16",
        "vitl16",
        "vitb8",
        "vitb4",
        "vitl7",
        "tinyimagenet",
        "cifar10",
        "digits",
    )

    assert {one.stem for one in _SHIPPED} == {f"msn_{name}" for name in msn} | {"simsiam_r50", "simsiam_cifar_r18"}


@pytest.mark.parametrize("file", _SHIPPED, ids=lambda one: one.stem)
def test_a_shipped_recipe_reads_builds_and_opens_as_a_lab_note(file: Path) -> None:
    recipe = read_recipe(file)
    note = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))

    assert all(f"# {word}:" in note for word in ("Reproduces", "Command", "Expected", "Time"))
    assert f"configs/pretrain/{file.name}" in note
    assert sum(one.numel() for one in outline_network(name_architecture(recipe.encoder.name)).parameters()) > 0


@pytest.mark.parametrize(
    ("name", "epochs", "ratio", "patches"),
    [
        ("msn_vits16", 800, 0.15, 196),
        ("msn_vitb16", 600, 0.3, 196),
        ("msn_vitl16", 600, 0.5, 196),
        ("msn_vitb8", 600, 0.3, 784),
        ("msn_vitb4", 300, 0.7, 3136),
        ("msn_vitl7", 200, 0.7, 1024),
    ],
)
def test_published_backbones_have_their_epochs_masks_and_patches(
    name: str, epochs: int, ratio: float, patches: int
) -> None:
    recipe = read_recipe(shipped_folder("configs") / "pretrain" / f"{name}.yaml")
    network = outline_network(name_architecture(recipe.encoder.name))

    assert (recipe.optimization.epochs, recipe.masking.ratio) == (epochs, ratio)
    assert network.patch_embed.num_patches == patches


def test_released_recipe_is_the_default_and_the_headline_differs_in_its_targets_alone() -> None:
    folder = shipped_folder("configs") / "pretrain"
    released, headline = read_recipe(folder / "msn_vits16.yaml"), read_recipe(folder / "msn_vits16_headline.yaml")

    assert released == MSNRecipe()
    assert (headline.criterion.sinkhorn_iterations, headline.criterion.me_max_weight) == (0, 5.0)
    overrides = ("criterion.sinkhorn_iterations=0", "criterion.me_max_weight=5")
    assert read_recipe(folder / "msn_vits16.yaml", overrides=overrides) == headline
