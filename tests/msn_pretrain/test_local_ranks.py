"""Local ranks: what the launcher opens for them."""

import socket
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from msn_pretrain import local_ranks


def test_the_store_of_local_ranks_is_reachable_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = subprocess.Popen, []

    def start_rank(command: object, *, env: Mapping[str, str]) -> Any:
        port = int(env["MASTER_PORT"])
        socket.create_connection(("127.0.0.1", port)).close()
        # On Linux all of 127/8 is this machine: a store on all interfaces answers here too.
        with socket.socket() as other:
            refused.append(other.connect_ex(("127.0.0.2", port)) != 0)
        return start(["true"])

    monkeypatch.setattr("msn_pretrain.local_ranks.subprocess.Popen", start_rank)

    assert local_ranks.run_local_ranks(["recipe.yaml"], ["cpu", "cpu"]) == 0
    assert refused == [True, True]
