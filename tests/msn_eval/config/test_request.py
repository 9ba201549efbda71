from dataclasses import replace

import pytest

from msn_eval.config.recipes import LinearRecipe
from msn_eval.config.request import EvaluationConfig
from msn_eval.errors import UsageError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("probe", [], "--probe: nothing given"),
        ("subset", [], "--subset: nothing given"),
        ("tap", "cls_norm", "--tap: cannot be 'cls_norm'. Did you mean cls-norm?"),
        ("solver", "sgd", "--solver: cannot be 'sgd'."),
        ("decoder", "opencv", "--decoder: cannot be 'opencv'."),
        ("on_bad_image", "skp", "--on-bad-image: cannot be 'skp'. Did you mean skip?\nAllowed: error, skip."),
        ("precision", "fp23", "--precision: cannot be 'fp23'. Did you mean fp32?"),
        ("device", "gpu", "--device gpu: not a device\nUse auto, cpu, cuda or cuda:N."),
        ("device", "cuda:", "--device cuda:: not a device"),
        ("device", "cpu\n", "not a device"),
        ("lambda_", [0.1, 0.0], "--lambda 0.0: out of range\nGive a number above 0."),
        ("lambda_", [float("nan")], "--lambda nan: out of range"),
        ("lambda_", ["0.1", "best"], "--lambda best: not a number\nGive a finite number above 0, or auto."),
        ("patch_drop", 1.0, "--patch-drop 1.0: out of range\nGive a number at least 0 and below 1."),
        ("temperature", [0.0], "--temperature 0.0: out of range"),
        ("k", [10, 0], "--k 0: out of range\nGive a number at least 1."),
        ("seed", -1, "--seed -1: out of range\nGive a number at least 0 and below 18446744073709551616."),
        ("seed", 10**400, ": out of range\nGive a number at least 0"),
        ("limit", 0, "--limit 0: out of range\nGive a number at least 1."),
        ("image_pixels", 0, "--image-pixels 0: out of range"),
        ("batch_size", "0", "--batch-size 0: out of range\nGive `auto` or a whole number of at least 1."),
        ("batch_size", "-8", "--batch-size -8: out of range"),
        ("batch_size", "8.0", "--batch-size 8.0: out of range"),
        ("batch_size", "", "--batch-size : out of range"),
        ("mean", [0.5, 0.5], "--mean 0.5,0.5: not three numbers\nGive one per channel: R,G,B."),
        (
            "mean",
            [123.675, 116.28, 103.53],
            "--mean 123.675,116.28,103.53: out of range\nGive values on the [0, 1] scale",
        ),
        ("mean", [0.5, -0.1, 0.5], "--mean 0.5,-0.1,0.5: out of range"),
        ("mean", [0.5, float("nan"), 0.5], "--mean 0.5,nan,0.5: out of range"),
        ("std", [0.5, 0.5, 0.0], "--std 0.5,0.5,0: not above 0"),
        ("std", [58.395, 57.12, 57.375], "--std 58.395,57.12,57.375: out of range"),
        ("std", [0.5, 0.5, float("inf")], "--std 0.5,0.5,inf: out of range"),
        ("workers", "-1", "--workers -1: out of range\nGive `auto` or a whole number of at least 0."),
    ],
    ids=lambda part: repr(part)[:24],
)
def test_value_out_of_range_is_a_usage_error_that_names_the_option(field: str, value: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        EvaluationConfig(**{field: value})
    assert caught.value.exit_code == 2
    assert message in caught.value.what + "\n" + caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"probe": ["logistic", "knn", "ncm"]},
        {"tap": "cls4"},
        {"lambda_": [1e-12, 1e6], "temperature": [0.01]},
        {"k": [1]},
        {"limit": 1, "image_pixels": 1, "seed": 0},
        {"device": "cuda:10"},
        {"device": "cpu", "precision": "bf16", "solver": "sklearn", "on_bad_image": "skip"},
        {"batch_size": "1", "workers": "0"},
        {"mean": [0.0, 0.0, 1.0], "std": [1.0, 1.0, 0.001]},
    ],
    ids=lambda options: " ".join(options),
)
def test_value_at_the_edge_of_its_range_is_accepted(options: dict[str, object]) -> None:
    assert all(getattr(EvaluationConfig(**options), name) == value for name, value in options.items())


def test_defaults_are_as_documented() -> None:
    config = EvaluationConfig()
    assert (config.subset, config.probe, config.out) == (["low-shot"], ["logistic"], "runs")
    assert (config.seed, config.on_bad_image, config.decoder, config.limit) == (0, "error", "pillow", None)


@pytest.mark.parametrize(("value", "count"), [("64", 64), ("auto", None)])
def test_count_is_a_number_or_left_to_the_device(value: str, count: int | None) -> None:
    config = EvaluationConfig(batch_size=value, workers=value)
    assert (config.batch_images, config.worker_count) == (count, count)


def test_changed_copy_is_checked_again() -> None:
    with pytest.raises(UsageError, match="--seed -1"):
        replace(EvaluationConfig(), seed=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": ["finetune"], "precision": "fp16"}, "--precision fp16"),
        ({"probe": ["finetune"], "patch_drop": 0.7}, "--patch-drop: fine-tuning uses all patches"),
        ({"probe": ["logistic", "finetune"], "compile": True}, "--compile: fine-tuning trains the uncompiled network"),
        ({"probe": ["linear-augmented"], "patch_drop": 0.5}, "--patch-drop: linear-augmented encodes whole crops"),
        ({"save": "folder"}, "--save: no network is trained"),
        ({"probe": ["finetune"], "save": "folder", "canary": True}, "with --canary nothing is written"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EvaluationConfig(**options)


def test_tap_option_beside_taps_to_choose_from_is_refused() -> None:
    recipe = LinearRecipe(taps=["mean", "cls"])

    with pytest.raises(UsageError) as caught:
        EvaluationConfig(probe=["linear"], tap="mean", linear=recipe)

    assert str(caught.value) == "--tap mean: linear.taps names cls, mean\nLeave out one of them."
    assert EvaluationConfig(probe=["knn"], tap="mean", linear=recipe).tap == "mean"


# Architectures.


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        (None, {"a.pth": None, "b=c.pth": None}),
        (["vit"], {"a.pth": "vit", "b=c.pth": "vit"}),
        (["a.pth=vit?depth=2"], {"a.pth": "vit?depth=2", "b=c.pth": None}),
        (["b=c.pth=vit", "resnet50"], {"a.pth": "resnet50", "b=c.pth": "vit"}),
        (["vit?depth=2", "a.pth=vit?depth=3"], {"a.pth": "vit?depth=3", "b=c.pth": "vit?depth=2"}),
        (["b=vit", "resnet50"], {"a.pth": "resnet50", "b=c.pth": "vit"}),
        (["b=vit?depth=2"], {"a.pth": None, "b=c.pth": "vit?depth=2"}),
    ],
    ids=str,
)
def test_architecture_is_that_of_the_checkpoint_or_of_all(
    arch: list[str] | None, expected: dict[str, str | None]
) -> None:
    config = EvaluationConfig(checkpoint=list(expected), arch=arch)
    assert {name: config.arch_of(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (["a.pt=vit"], "--arch a.pt=vit: 'a.pt' is not one of the checkpoints. Did you mean a.pth?"),
        (["vit", "resnet50"], "--arch: several architectures for all checkpoints"),
        (["a.pth=vit", "a.pth=resnet50"], "--arch: several architectures for a.pth"),
        (["b=vit", "b=c.pth=resnet50"], "--arch: several architectures for b=c.pth"),
    ],
)
def test_architecture_of_no_checkpoint_or_of_one_twice_is_refused(arch: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        EvaluationConfig(checkpoint=["a.pth", "b=c.pth"], arch=arch)
    assert message in caught.value.what
