"""A residual network that SimSiam trained, in the layouts of others."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.distributed.group import Group as Group
from msn_eval.errors import CheckpointError
from msn_pretrain.config.load import read_recipe
from msn_pretrain.export import export
from msn_pretrain.training.train import train

_RECIPE = """
method: simsiam
run: {device: cpu, keep_every: 0}
data: {root: digits, workers: 0, limit: 1}
encoder: {name: resnet18, stem: %s}
views: {image_pixels: 48, random_views: 2, focal_views: 0}
projector: {layers: 2, output: 16, predictor: 8}
optimization: {epochs: 1, batch_size: 4}
"""


@pytest.fixture(scope="module", params=["cifar", "imagenet"])
def stem(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def run(stem: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a SimSiam run of two steps, whose BatchNorms have seen images."""
    folder = tmp_path_factory.mktemp(stem)
    (folder / "recipe.yaml").write_text(_RECIPE % stem)
    recipe = read_recipe(folder / "recipe.yaml", overrides=[f"run.dir={folder / 'run'}"])
    assert train(recipe, Group(rank=0, world=1, device=torch.device("cpu")), quiet=True) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run: Path) -> Tensor:
    """Return the features of three images."""
    with torch.no_grad():
        features: Tensor = read_checkpoint(str(run)).network(_images())
    return features


def _images() -> Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2))


def test_torchvisions_own_network_takes_all_weights_and_gives_equal_outputs(
    run: Path, stem: str, expected: Tensor, tmp_path: Path
) -> None:
    export(run, tmp_path / "theirs.pth", to="torchvision")
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    if stem == "cifar":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()

    network.load_state_dict(torch.load(tmp_path / "theirs.pth", weights_only=True))

    with torch.no_grad():
        torch.testing.assert_close(network.eval()(_images()), expected)


@pytest.mark.parametrize(("to", "name"), [("timm", "small.safetensors"), ("torchvision", "small.pth")])
def test_exported_file_states_its_architecture(run: Path, expected: Tensor, tmp_path: Path, to: str, name: str) -> None:
    export(run, tmp_path / name, to=to)

    checkpoint = read_checkpoint(str(tmp_path / name))

    assert checkpoint.matched == 1
    assert checkpoint.image_pixels == 48 or to != "timm"
    with torch.no_grad():
        assert torch.equal(checkpoint.network(_images()), expected)


@pytest.mark.parametrize(("to", "why"), [("hf", "it is a ResNet"), ("msn", "was not trained by MSN")])
def test_layouts_of_other_networks_are_refused(run: Path, tmp_path: Path, to: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        export(run, tmp_path / "other", to=to)
