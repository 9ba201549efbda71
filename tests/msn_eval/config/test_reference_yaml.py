"""The linear-evaluation YAML of the MSN repository, key by key. The values below are facts of that file."""

from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from msn_eval.cli import main
from msn_eval.config.recipes import AugmentedRecipe
from msn_eval.config.reference_yaml import KNOWN, map_reference_config
from msn_eval.config.request import EvaluationConfig
from msn_eval.errors import UsageError

RELEASED: dict[str, dict[str, object]] = {
    "meta": {
        "model_name": "deit_small",
        "master_port": 8888,
        "load_checkpoint": False,
        "training": True,
        "copy_data": False,
        "device": "cuda:0",
    },
    "data": {"root_path": "/datasets01/", "image_folder": "imagenet_full_size/061417/", "num_classes": 1000},
    "optimization": {"weight_decay": 0.0, "lr": 6.4, "epochs": 100, "num_blocks": 1, "normalize": True},
    "logging": {"folder": "/logs/", "write_tag": "experiment-1", "pretrain_path": "vits16.pth.tar"},
}


def _read(tmp_path: Path, *changes: tuple[str, object]) -> EvaluationConfig:
    from msn_eval.commands.evaluate import _translate
    from msn_eval.config.yaml_config import read_config

    content: Any = {section: dict(values) for section, values in RELEASED.items()}
    for key, value in changes:
        section, _, name = key.partition(".")
        content[section][name] = value
    path = tmp_path / "lineval.yaml"
    OmegaConf.save(OmegaConf.create(content), path)
    return read_config(EvaluationConfig, file=path, translate=_translate)


def test_the_released_file_is_the_published_evaluation(tmp_path: Path) -> None:
    assert _read(tmp_path) == EvaluationConfig(
        checkpoint=["/logs/vits16.pth.tar"],
        arch=["vit_small_patch16_224"],
        data="/datasets01/imagenet_full_size/061417",
        classes=1000,
        subset=["full"],
        probe=["linear-augmented"],
        device="cuda:0",
        out="/logs/experiment-1",
        linear_augmented=AugmentedRecipe(lr=[6.4], weight_decay=0.0, epochs=100, batch_size=16384),
    )


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("data.root_path", "/a", "data", "/a/imagenet_full_size/061417"),
        ("data.image_folder", "b/", "data", "/datasets01/b"),
        ("data.num_classes", 10, "classes", 10),
        ("logging.folder", "/there", "out", "/there/experiment-1"),
        ("logging.folder", "/there", "checkpoint", ["/there/vits16.pth.tar"]),
        ("logging.pretrain_path", "/elsewhere/b.pth.tar", "checkpoint", ["/elsewhere/b.pth.tar"]),
        ("logging.write_tag", "second", "out", "/logs/second"),
        ("meta.device", "cpu", "device", "cpu"),
        ("meta.model_name", "deit_base_p4", "arch", ["vit_base_patch16_224?patch_size=4"]),
        ("optimization.epochs", 3, "linear_augmented.epochs", 3),
        ("optimization.lr", 0.5, "linear_augmented.lr", [0.5]),
        ("optimization.weight_decay", 1e-4, "linear_augmented.weight_decay", 1e-4),
    ],
)
def test_key_sets_its_field(key: str, value: object, field: str, expected: object, tmp_path: Path) -> None:
    assert attrgetter(field)(_read(tmp_path, (key, value))) == expected


@pytest.mark.parametrize(("key", "value"), [("meta.load_checkpoint", True), ("meta.master_port", 1)])
def test_ignored_key_changes_nothing(key: str, value: object, tmp_path: Path) -> None:
    assert _read(tmp_path, (key, value)) == _read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("meta.copy_data", True, "Set it to false."),
        ("meta.training", False, "Set it to true."),
        ("optimization.normalize", False, "Set it to true."),
        ("optimization.num_blocks", 4, "Set it to 1."),
        ("meta.model_name", "deit_smal", "Known: "),
    ],
)
def test_unsupported_value_is_refused_with_its_key(key: str, value: object, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        _read(tmp_path, (key, value))

    assert f"lineval.yaml: {key}: " in str(caught.value)
    assert "cannot be mapped" in str(caught.value)
    assert hint in str(caught.value)


def test_every_known_key_is_tested() -> None:
    assert sorted(KNOWN) == sorted(f"{section}.{key}" for section, values in RELEASED.items() for key in values)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": {"root_path": "/", "image_folder": ""}}, r"lacks data\.num_classes"),
        ({"optimization": {**RELEASED["optimization"], "ref_lr": 1}}, r"unknown key 'optimization\.ref_lr'"),
        ({"criterion": {}}, "'criterion' is not a section"),
    ],
)
def test_missing_and_unknown_keys_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        map_reference_config(RELEASED | changed, where="x.yaml")


def test_file_is_evaluated_and_checks_the_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lineval.yaml"
    OmegaConf.save(OmegaConf.create(RELEASED), path)
    arguments = ["--config", str(path), "--checkpoint", "pixels", "--data", "digits", "--device", "cpu", "--no-cache"]
    arguments += ["--out", str(tmp_path / "runs"), "--subset", "1img@1", "linear_augmented.epochs=1", "arch=null", "-q"]

    assert main(arguments) == 21
    assert "digits has 10 classes, 1000 are asked for" in capsys.readouterr().err

    assert main([*arguments, "classes=10"]) == 0
    assert "linear-augmented" in capsys.readouterr().out
