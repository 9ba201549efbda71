"""Inspections of files whose content is known."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

import msn_eval
from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.checkpoints.inspection import Inspection, inspect_checkpoint
from msn_eval.errors import CheckpointError

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
MSNWriter = Callable[..., Path]


def saved(folder: Path, content: object, *, name: str = "vit.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def inspected(folder: Path, content: object, **options: str) -> Inspection:
    return inspect_checkpoint(saved(folder, content), **options)


def dino(draw: WeightMaker) -> dict[str, Weights]:
    head = {"head.mlp.0.weight": torch.ones(8, 192), "head.last_layer.weight_v": torch.ones(4, 8)}
    student = {f"module.backbone.{name}": tensor for name, tensor in draw().items()}
    teacher = {f"backbone.{name}": 0.9 * tensor for name, tensor in draw().items()}
    return {"student": student | {f"module.{name}": tensor for name, tensor in head.items()}, "teacher": teacher | head}


# Which network, and whose.


def test_msn_release_is_inspected_as_it_would_be_evaluated(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    facts, weights = inspect_checkpoint(msn_file()), vit_weights()
    assert (facts.family, facts.key, facts.arch, facts.epoch, facts.problem) == (
        "msn",
        "target_encoder",
        "vit_width192_depth2_patch8_32",
        600,
        None,
    )
    assert facts.params == sum(tensor.numel() for tensor in weights.values())


def test_every_weight_of_a_complete_network_is_used_and_matched(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    facts = inspect_checkpoint(msn_file())
    assert (set(facts.used), facts.matched) == (vit_weights().keys(), 1.0)
    assert set(facts.dropped) >= {"fc.fc1.weight", "fc.fc1.bias"}
    assert (facts.missing, facts.left_over, facts.reshaped, facts.alarms) == ((), (), (), ())


def test_every_network_is_listed_and_the_used_one_marked(tmp_path: Path, vit_weights: WeightMaker) -> None:
    networks = inspected(tmp_path, dino(vit_weights)).networks
    assert [(one.key, one.used, one.tensors) for one in networks] == [("student", False, 30), ("teacher", True, 30)]


def test_student_asked_for_by_key_is_used_with_an_alarm(tmp_path: Path, vit_weights: WeightMaker) -> None:
    facts = inspected(tmp_path, dino(vit_weights), key="student")
    assert (facts.key, facts.why, facts.alarms) == (
        "student",
        "asked for by --checkpoint-key",
        ("'teacher' stands beside it, and is what the method's authors evaluate",),
    )


def test_residual_network_has_no_patches_and_no_positions(tmp_path: Path) -> None:
    facts = inspected(tmp_path, torchvision.models.resnet18().state_dict())
    assert (facts.family, facts.arch, facts.image_pixels, facts.problem) == ("torchvision", "resnet18", 224, None)
    assert (facts.patch_pixels, facts.stored_pixels, facts.positions) == (None, None, None)


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({}, "37 x 37 to 16 x 16 patches, bicubic, not antialiased, offset 0.1, as the authors evaluate"),
        ({"register_tokens": torch.ones(1, 4, 192)}, "37 x 37 to 16 x 16 patches, bicubic, antialiased, as the authors evaluate"),
    ],
    ids=["plain", "registers"],
)  # fmt: skip
def test_positions_of_dinov2_are_reported_as_changed(
    tmp_path: Path, vit_weights: WeightMaker, extra: Weights, line: str
) -> None:
    weights = vit_weights(depth=1, patch=14, image=518, layer_scale=True) | {"mask_token": torch.ones(1, 192)}
    facts = inspected(tmp_path, weights | extra)
    assert (facts.positions, facts.stored_pixels, facts.image_pixels, facts.patch_pixels) == (line, 518, 224, 14)


# The file.


@pytest.mark.parametrize("container", ["zip", "pickle", "safetensors"])
def test_inspection_is_the_same_in_every_container(tmp_path: Path, vit_weights: WeightMaker, container: str) -> None:
    weights, path = vit_weights(), tmp_path / "vit.bin"
    if container == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=container == "zip")
    facts, reference = inspect_checkpoint(path), inspected(tmp_path, weights)
    assert facts.container == container
    assert (facts.statistics, facts.networks, set(facts.used), facts.arch) == (
        reference.statistics,
        reference.networks,
        set(reference.used),
        reference.arch,
    )


# What an evaluation would refuse.


def test_open_choice_leaves_all_that_follows_from_it_open(tmp_path: Path, vit_weights: WeightMaker) -> None:
    facts = inspected(tmp_path, {"one": vit_weights(), "two": vit_weights(depth=1)})
    assert [one.used for one in facts.networks] == [False, False]
    assert (facts.key, facts.family, facts.arch, facts.statistics, facts.matched) == (None, None, None, None, None)


def test_file_without_a_network_is_a_problem(tmp_path: Path) -> None:
    facts = inspected(tmp_path, {"epoch": 3, "loss": 0.5})
    assert (facts.networks, str(facts.problem).startswith("holds no network"), facts.epoch) == ((), True, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_a_problem_and_an_alarm(
    tmp_path: Path, vit_weights: WeightMaker, value: float
) -> None:
    facts = inspected(tmp_path, vit_weights() | {"norm.bias": torch.full((192,), value)})
    assert (facts.problem, facts.alarms) == (
        "weights hold NaN or infinite values",
        ("NaN or infinite values in norm.bias",),
    )


@pytest.mark.parametrize(
    "content",
    [
        lambda draw: {"one": draw(), "two": draw(depth=1)},
        lambda draw: draw(width=96),
        lambda draw: draw() | {"norm.bias": torch.full((192,), math.nan)},
        lambda draw: draw() | {"neck.bias": torch.ones(2)},
        lambda draw: draw(),
        lambda draw: draw() | {"norm.bias": torch.full((192,), 1e200, dtype=torch.float64)},
        lambda draw: draw() | {"norm.bias": torch.ones(192, dtype=torch.int64)},
        lambda draw: draw() | {"norm.bias": torch.ones(192, dtype=torch.complex64)},
    ],
    ids=["several", "width", "NaN", "left over", "valid", "beyond float32", "integers", "complex"],
)
def test_problem_is_there_exactly_where_an_evaluation_refuses(
    tmp_path: Path, vit_weights: WeightMaker, content: Callable[[WeightMaker], object]
) -> None:
    path = saved(tmp_path, content(vit_weights))
    try:
        read_checkpoint(str(path))
        refused = False
    except CheckpointError:
        refused = True
    assert (inspect_checkpoint(path).problem is not None) == refused


# Statistics, against torch's own.


def flat(weights: Weights) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in weights.values()])


def test_statistics_are_those_of_all_values_together(msn_file: MSNWriter, vit_weights: WeightMaker) -> None:
    found, values = inspect_checkpoint(msn_file()).statistics, flat(vit_weights())
    assert found is not None
    expected = pytest.approx((values.mean().item(), values.std(correction=0).item()), rel=1e-9)
    assert (found["mean"], found["std"]) == expected
    assert [found[name] for name in ("minimum", "maximum", "values")] == [values.min(), values.max(), len(values)]


def test_statistics_leave_out_heads_and_counts(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    found = inspected(tmp_path, state | {"fc.weight": torch.full((1000, 512), 1e6)}).statistics
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("fc.") and tensor.is_floating_point()}
    assert found is not None
    assert (found["values"], found["maximum"], found["dtypes"]) == (flat(kept).numel(), flat(kept).max(), ["float32"])


# Memory.

# The peak is set back to what is held after the imports; ru_maxrss begins with that of the process that forked.
MEASURED = """
import sys
from pathlib import Path
import timm
from msn_eval.checkpoints.inspection import inspect_checkpoint

def kibibytes(name):
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return int(line.split()[1])

Path("/proc/self/clear_refs").write_text("5")
before = kibibytes("VmRSS")
for path in sys.argv[1:]:
    assert inspect_checkpoint(Path(path)).problem is None
print(1024 * (kibibytes("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux reports peaks")
@pytest.mark.slow
def test_large_file_is_held_in_memory_once(tmp_path: Path, vit_weights: WeightMaker) -> None:
    weights = vit_weights(width=1024, depth=4)
    paths = [saved(tmp_path, weights), tmp_path / "vit.safetensors"]
    safetensors.torch.save_file(weights, paths[1])
    child = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)],
        env=os.environ | {"PYTHONPATH": str(Path(msn_eval.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert int(child.stdout) < 1.6 * paths[0].stat().st_size


def test_positions_of_a_rectangle_are_an_alarm(tmp_path: Path, vit_weights: WeightMaker) -> None:
    weights = vit_weights()
    frequencies = 10_000.0 ** -(torch.arange(48) / 48)
    down = (torch.arange(2)[:, None] * frequencies).repeat_interleave(8, 0)
    across = (torch.arange(8)[:, None] * frequencies).repeat(2, 1)
    patches = torch.cat([down.sin(), down.cos(), across.sin(), across.cos()], dim=1)
    facts = inspected(tmp_path, weights | {"pos_embed": torch.cat([torch.zeros(1, 192), patches])[None]})
    assert [alarm for alarm in facts.alarms if "as if learned for 2 x 8 patches; they are read as 4 x 4" in alarm]
    assert facts.problem is None
