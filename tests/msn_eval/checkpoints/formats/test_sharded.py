"""Training states in shards are refused, with the command that converts them."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.errors import CheckpointError


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(str(path))
    return caught.value


@pytest.fixture
def dcp_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step-100"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": nn.Linear(2, 2).state_dict()}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("name", ["", "__0_0.distcp", ".metadata"])
def test_distributed_checkpoint_is_refused_with_torchs_own_command(dcp_folder: Path, name: str) -> None:
    error = refusal(dcp_folder / name)

    assert "unpickles its .metadata without restriction" in error.what
    assert f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {dcp_folder} weights.pth" in error.hint


@pytest.mark.parametrize("shown", ["", "global_step7", "global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_state_of_deepspeed_is_refused_with_its_own_script(tmp_path: Path, shown: str) -> None:
    step = tmp_path / "run" / "global_step7"
    step.mkdir(parents=True)
    torch.save({"optimizer_state_dict": {}}, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "run" / "zero_to_fp32.py").touch()

    assert f"cd {tmp_path / 'run'} && python zero_to_fp32.py . weights" in refusal(tmp_path / "run" / shown).hint


def test_share_of_deepspeeds_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mp_rank_00_model_states.pt"
    config = {"zero_optimization": {"stage": 3}}
    torch.save({"module": {"weight": torch.empty(0)}, "ds_config": config, "ds_version": "0.16"}, path)

    assert "python zero_to_fp32.py" in refusal(path).hint


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module._flat_param", "blocks.0.flat_param", "flat_param_0"])
def test_flat_parameters_are_refused_by_name(tmp_path: Path, name: str) -> None:
    torch.save({"model": {name: torch.ones(9)}}, tmp_path / "rank0.pt")

    error = refusal(tmp_path / "rank0.pt")

    assert name in error.what
    assert "full_state_dict=True" in error.hint
