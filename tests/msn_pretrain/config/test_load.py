"""Recipes from YAML and overrides, and those that ship."""

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from msn_eval.config.reference_yaml import NETWORKS
from msn_eval.errors import UsageError
from msn_eval.files.package_data import find_package_folder
from msn_eval.models.architectures import name_architecture
from msn_eval.models.build import outline_network
from msn_pretrain.config.load import KNOWN, read_recipe, recipe_as_yaml
from msn_pretrain.config.recipe import MSNRecipe, Run, SimSiamRecipe

_SHIPPED = sorted((find_package_folder("configs") / "pretrain").glob("*.yaml"))


def recipe_of(folder: Path, text: str, *overrides: str) -> MSNRecipe | SimSiamRecipe:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return read_recipe(file, overrides=overrides)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    text = "optimization:\n  epochs: 3\n  batch_size: 8\n  learning_rate: 1e-3\n"
    optimization = recipe_of(tmp_path, text, "optimization.epochs=5").optimization

    assert (optimization.epochs, optimization.batch_size, optimization.warmup) == (5, 8, 15)
    assert optimization.learning_rate == 1e-3


def test_folder_may_have_a_number_as_its_name(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, "method: msn", "run.dir=007").run.dir == "007"


def test_method_decides_which_recipe_is_read(tmp_path: Path) -> None:
    assert isinstance(recipe_of(tmp_path, "method: simsiam"), SimSiamRecipe)
    assert isinstance(recipe_of(tmp_path, "run:\n  seed: 1"), MSNRecipe)


def test_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    overrides = ("watch.probes=[knn,ridge]", "criterion.prior=power_law")
    recipe = recipe_of(tmp_path, "views:\n  crop_scale: [0.4, 1]\n", *overrides)

    assert recipe_of(tmp_path, recipe_as_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.epoch=3", "unknown key 'optimization.epoch'. Did you mean optimization.epochs?"),
        ("epochs=3", "unknown key 'epochs'. Did you mean optimization.epochs?"),
        ("optmization.epochs=3", "unknown key 'optmization.epochs'. Did you mean optimization.epochs?"),
        ("optimization.epochs=many", "optimization.epochs: cannot be 'many'"),
        ("optimization.epochs=0", "override 'optimization.epochs=0': optimization.epochs: 0 is out of range"),
        ("optimization.epochs", "is not of the form key=value"),
        ("views.crop_scale=[0.3]", "views.crop_scale: [0.3] are not two numbers"),
        ("views=3", "views is a section, not a value"),
        ("run.dir={", "the value is not valid YAML"),
        ("method=mns", "override 'method=mns': method: cannot be 'mns'. Did you mean msn?"),
        ("run.seed.more=1", "run.seed"),
    ],
)
def test_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of(tmp_path, "method: msn", override)

    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["- 1\n", "run: {", "run: &a\n  dir: *a\n", "run:\n  seed: -1\n"])
def test_wrong_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of(tmp_path, text)

    assert str(tmp_path / "recipe.yaml") in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        read_recipe(tmp_path / "nothing.yaml")


def test_all_promised_recipes_ship() -> None:
    names = [
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
    ]
    msn = {f"msn_{name}" for name in names}

    assert {file.stem for file in _SHIPPED} == msn | {"simsiam_r50", "simsiam_cifar_r18", "simsiam_small_vit"}


@pytest.mark.parametrize("file", _SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipe_reads_builds_and_states_what_it_reproduces(file: Path) -> None:
    recipe = read_recipe(file)
    note = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))

    assert all(f"# {word}:" in note for word in ("Reproduces", "Command", "Expected", "Time"))
    assert f"configs/pretrain/{file.name}" in note
    assert list(outline_network(name_architecture(recipe.encoder.name)).parameters())


@pytest.mark.parametrize(
    ("name", "epochs", "ratio", "patches"),
    [
        ("msn_vits16", 800, 0.15, 196),
        ("msn_vitb16", 600, 0.3, 196),
        ("msn_vitl16", 600, 0.5, 196),
        ("msn_vitb8", 600, 0.3, 784),
        ("msn_vitb4", 400, 0.7, 3136),
        ("msn_vitl7", 200, 0.7, 1024),
    ],
)
def test_published_backbones_have_their_epochs_masks_and_patches(
    name: str, epochs: int, ratio: float, patches: int
) -> None:
    recipe = read_recipe(find_package_folder("configs") / "pretrain" / f"{name}.yaml")
    network = outline_network(name_architecture(recipe.encoder.name))

    assert (recipe.optimization.epochs, recipe.masking.ratio) == (epochs, ratio)
    assert network.patch_embed.num_patches == patches


def test_released_recipe_is_the_default_and_the_headline_recipe_differs_only_in_its_targets() -> None:
    folder = find_package_folder("configs") / "pretrain"
    released, headline = read_recipe(folder / "msn_vits16.yaml"), read_recipe(folder / "msn_vits16_headline.yaml")

    assert released == MSNRecipe()
    assert (headline.criterion.sinkhorn_iterations, headline.criterion.me_max_weight) == (0, 5.0)
    overrides = ("criterion.sinkhorn_iterations=0", "criterion.me_max_weight=5")
    assert read_recipe(folder / "msn_vits16.yaml", overrides=overrides) == headline


RELEASED = """
criterion: {batch_size: 64, num_proto: 1024, temperature: 0.1, start_sharpen: 0.25, final_sharpen: 0.25, me_max: true,
  memax_weight: 1.0, use_ent: true, ent_weight: 0.0, use_sinkhorn: true}
data: {root_path: /datasets, image_folder: imagenet/, num_workers: 10, pin_mem: true, color_jitter_strength: 0.5,
  label_smoothing: 0.0, patch_drop: 0.15, rand_size: 224, focal_size: 96, rand_views: 1, focal_views: 10}
logging: {folder: /logs/, write_tag: first}
meta: {model_name: deit_small, drop_path_rate: 0.0, hidden_dim: 2048, output_dim: 256, use_bn: true, use_fp16: false,
  use_pred_head: false, bottleneck: 1, copy_data: false, load_checkpoint: false, read_checkpoint: null}
optimization: {epochs: 800, warmup: 15, start_lr: 0.0002, lr: 0.001, final_lr: 1.0e-06, weight_decay: 0.04,
  final_weight_decay: 0.4, clip_grad: 3.0}
"""
NOTHING = object()


def read(
    folder: Path, *changes: tuple[str, object], world_size: int = 16, overrides: tuple[str, ...] = ()
) -> MSNRecipe:
    """Read the released file with some keys changed, or taken out."""
    content: Any = OmegaConf.to_container(OmegaConf.create(RELEASED))
    for key, value in changes:
        section, name = key.split(".")
        content[section][name] = value
        if value is NOTHING:
            del content[section][name]
    file = folder / "theirs.yaml"
    OmegaConf.save(OmegaConf.create(content), file)
    recipe = read_recipe(file, overrides=overrides, world_size=world_size)
    assert isinstance(recipe, MSNRecipe)
    return recipe


def test_released_file_on_16_ranks_is_our_released_recipe(tmp_path: Path) -> None:
    recipe = read(tmp_path)

    ours = MSNRecipe(run=Run(dir="/logs/first", precision="fp32"))
    assert (recipe.data.root, recipe.data.workers, recipe.data.pin_memory) == ("/datasets/imagenet", 10, True)
    for section in ("views", "encoder", "head", "masking", "criterion", "optimization", "ema", "run"):
        assert getattr(recipe, section) == getattr(ours, section)


def test_published_file_of_vit_b4_on_384_ranks_is_our_recipe(tmp_path: Path) -> None:
    # github.com/facebookresearch/msn/issues/5 differs from the released file in these keys, and in paths and workers
    changes = {
        "criterion.batch_size": 3,
        "data.patch_drop": 0.7,
        "meta.model_name": "deit_base_p4",
        "optimization.epochs": 400,
    }

    theirs = read(tmp_path, *changes.items(), world_size=48 * 8)

    ours = read_recipe(find_package_folder("configs") / "pretrain" / "msn_vitb4.yaml")
    for section in ("views", "encoder", "head", "masking", "criterion", "optimization", "ema"):
        assert getattr(theirs, section) == getattr(ours, section)


@pytest.mark.parametrize(
    ("theirs", "value", "ours", "expected"),
    [
        ("criterion.batch_size", 32, "optimization.batch_size", 512),
        ("criterion.num_proto", 512, "criterion.prototypes", 512),
        ("criterion.temperature", 0.2, "criterion.temperature", 0.2),
        ("criterion.start_sharpen", 0.5, "criterion.sharpening", 0.5),
        ("criterion.final_sharpen", 0.1, "criterion.final_sharpening", 0.1),
        ("criterion.me_max", False, "criterion.me_max_weight", 0.0),
        ("criterion.memax_weight", 5.0, "criterion.me_max_weight", 5.0),
        ("criterion.memax_weight", NOTHING, "criterion.me_max_weight", 1.0),
        ("criterion.ent_weight", 0.3, "criterion.entropy_weight", 0.3),
        ("criterion.ent_weight", NOTHING, "criterion.entropy_weight", 1.0),
        ("criterion.use_sinkhorn", False, "criterion.sinkhorn_iterations", 0),
        ("data.root_path", "/else", "data.root", "/else/imagenet"),
        ("data.image_folder", "small", "data.root", "/datasets/small"),
        ("data.num_workers", 3, "data.workers", 3),
        ("data.pin_mem", False, "data.pin_memory", False),
        ("data.color_jitter_strength", 1.0, "views.brightness", 0.8),
        ("data.color_jitter_strength", 1.0, "views.contrast", 0.8),
        ("data.color_jitter_strength", 1.0, "views.saturation", 0.8),
        ("data.color_jitter_strength", 1.0, "views.hue", 0.2),
        ("data.patch_drop", 0.7, "masking.ratio", 0.7),
        ("data.rand_size", 192, "views.image_pixels", 192),
        ("data.focal_size", 64, "views.focal_pixels", 64),
        ("data.rand_views", 2, "views.random_views", 2),
        ("data.focal_views", 0, "views.focal_views", 0),
        ("logging.folder", "/runs", "run.dir", "/runs/first"),
        ("logging.write_tag", "second", "run.dir", "/logs/second"),
        ("meta.model_name", "deit_base_p4", "encoder.name", "vit_base_patch16_224?patch_size=4"),
        ("meta.drop_path_rate", 0.1, "encoder.drop_path", 0.1),
        ("meta.hidden_dim", 512, "head.hidden", 512),
        ("meta.output_dim", 64, "head.output", 64),
        ("meta.use_bn", False, "head.batch_norm", False),
        ("meta.load_checkpoint", True, "run.dir", "/logs/first"),
        ("optimization.epochs", 3, "optimization.epochs", 3),
        ("optimization.warmup", 2, "optimization.warmup", 2.0),
        ("optimization.start_lr", 0.1, "optimization.start_learning_rate", 0.1),
        ("optimization.lr", 0.2, "optimization.learning_rate", 0.2),
        ("optimization.final_lr", 0.3, "optimization.final_learning_rate", 0.3),
        ("optimization.weight_decay", 0.1, "optimization.weight_decay", 0.1),
        ("optimization.final_weight_decay", 0.2, "optimization.final_weight_decay", 0.2),
        ("optimization.clip_grad", 0, "optimization.clip", 0.0),
    ],
)
def test_each_key_sets_our_field(tmp_path: Path, theirs: str, value: object, ours: str, expected: object) -> None:
    assert attrgetter(ours)(read(tmp_path, (theirs, value))) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("criterion.freeze_proto", True),
        ("data.label_smoothing", 0.1),
        ("meta.read_checkpoint", "epoch.pth.tar"),
        ("meta.copy_data", True),
        ("meta.use_fp16", True),
        ("meta.use_pred_head", True),
        ("meta.bottleneck", 2),
        ("meta.two_layer", True),
        ("meta.model_name", "deit_small_convstem"),
    ],
)
def test_unsupported_value_is_refused_with_its_key(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"{key}: .*cannot be mapped") as caught:
        read(tmp_path, (key, value))

    assert caught.value.hint


def test_every_known_key_is_tested() -> None:
    tested = {f"{section}.{key}" for section, values in OmegaConf.create(RELEASED).items() for key in values}

    assert tested | {"criterion.freeze_proto", "meta.two_layer"} == set(KNOWN)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimization.clip_gard", 3.0, r"Did you mean optimization\.clip_grad\?"),
        ("optimization.epochs", NOTHING, r"lacks optimization\.epochs"),
        ("optimization.epochs", "many", r"optimization\.epochs: cannot be .many"),
        ("criterion.batch_size", "many", r"criterion\.batch_size: .many. is not a number"),
    ],
)
def test_wrong_key_or_type_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, (key, value))


def test_our_overrides_work_on_their_file(tmp_path: Path) -> None:
    recipe = read(tmp_path, overrides=("data.root=/mine", "optimization.epochs=2"))

    assert (recipe.data.root, recipe.optimization.epochs) == ("/mine", 2)


@pytest.mark.parametrize("theirs", ["deit_tiny", "deit_small_p7", "deit_base_p4", "deit_large_p7", "deit_huge_p10"])
def test_their_networks_have_their_patches_and_widths(theirs: str) -> None:
    widths = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}
    size, patch = theirs.split("_")[1], int(theirs.partition("_p")[2] or 16)

    network = outline_network(name_architecture(NETWORKS[theirs]))

    assert (network.embed_dim, len(network.blocks)) == widths[size]
    assert network.patch_embed.proj.kernel_size == (patch, patch)
    assert network.pos_embed.shape[1] == 1 + (224 // patch) ** 2
    assert network.norm.eps == 1e-6
