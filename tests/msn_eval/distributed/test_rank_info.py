"""Ranks: what the variables of a launcher must contain."""

import pytest

from msn_eval.distributed.rank_info import read_rank_info
from msn_eval.errors import DistributedError

_ENVIRONMENT = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4000"}


def test_a_rank_is_read_from_the_variables() -> None:
    info = read_rank_info(_ENVIRONMENT)

    assert info is not None
    assert (info.rank, info.local_rank, info.world, info.endpoint) == (1, 0, 2, "127.0.0.1:4000")


@pytest.mark.parametrize(("rank", "launchers", "holds"), [("0", "", True), ("0", "True", False), ("1", "", False)])
def test_the_first_rank_holds_the_store_unless_the_launcher_does(rank: str, launchers: str, holds: bool) -> None:
    info = read_rank_info(_ENVIRONMENT | {"RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": launchers})

    assert info is not None
    assert info.holds_store is holds


@pytest.mark.parametrize(
    ("changed", "name", "what"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE", "is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE", "is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE", "is '0'"),
        ({"RANK": ""}, "RANK", "is not set"),
        ({"RANK": "2"}, "RANK", "is '2', not an integer from 0 to 1"),
        ({"RANK": "-1"}, "RANK", "is '-1'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK", "is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR", "is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT", "is not set"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT", "is '65536'"),
    ],
)
def test_an_incomplete_environment_names_the_variable(changed: dict[str, str], name: str, what: str) -> None:
    with pytest.raises(DistributedError) as caught:
        read_rank_info(_ENVIRONMENT | changed)

    assert f"but {name} {what}" in str(caught.value)
    assert caught.value.exit_code == 31
