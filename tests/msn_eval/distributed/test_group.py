"""Ranks as real processes: what they exchange, and how all of them end when one does."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import pytest
import torch.distributed
from torch.utils.data import DataLoader

from msn_eval.distributed.group import (
    ALONE,
    Group,
    all_gather_object,
    barrier,
    broadcast_from_rank0,
    check_equal_across_ranks,
    join_group,
    split_across_ranks,
)
from msn_eval.distributed.rank_info import Timeouts
from msn_eval.errors import DataError
from msn_eval.program import run_program

QUICK = Timeouts(join_seconds=5, beat_seconds=0.05, silent_seconds=1, linger_seconds=0.5, unwind_seconds=0.5)
PATIENT = replace(QUICK, silent_seconds=60)
CALM = replace(PATIENT, linger_seconds=1)
TERMINATED = "Terminated. Kept."
Body = Callable[[Group], object]
Start = Callable[..., "Job"]
_CPP_WARNING = re.compile(r"\[W|\[rank\d+\]:\[W|Exception raised from|frame #|<omitting|$")


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """How one rank ended: the exit code and the output of a command."""

    code: int
    output: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What was printed, without the warnings of torch's C++ code, which commands switch off."""
        return [line for line in self.output.splitlines() if not _CPP_WARNING.match(line)]


@dataclass(kw_only=True)
class Job:
    """Running ranks."""

    processes: list[BaseProcess]
    outputs: list[Path]
    started: float

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def wait(self) -> list[RankResult]:
        """Wait for all ranks and return how they ended."""
        results = []
        for process, output in zip(self.processes, self.outputs, strict=True):
            process.join(20)
            assert process.exitcode is not None, "still runs"
            left = output.with_suffix(".left")
            seconds = (float(left.read_text()) if left.exists() else time.monotonic()) - self.started
            results.append(RankResult(code=process.exitcode, output=output.read_text(), seconds=seconds))
        return results

    def wait_until_joined(self) -> None:
        deadline = time.monotonic() + 10
        while not all("joined" in path.read_text() for path in self.outputs):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, map(str, (rank, world, rank, "127.0.0.1", port)), strict=True))


@pytest.fixture
def start(tmp_path: Path, fork_process: Callable[..., BaseProcess]) -> Start:
    """Return a function that runs a body as every rank of a job."""
    jobs: list[Job] = []

    def run(
        world: int,
        body: Body,
        *,
        timeouts: Timeouts = PATIENT,
        port: int | None = None,
        ranks: Sequence[int] | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Job:
        port = port or free_port()
        job = Job(processes=[], outputs=[], started=time.monotonic())
        jobs.append(job)
        for rank in range(world) if ranks is None else ranks:
            output = tmp_path / f"{len(jobs)}-{rank}.txt"
            output.touch()
            variables = rank_environment(rank, world, port) | dict(environment)
            job.processes.append(fork_process(_run_rank, body, variables, timeouts, output))
            job.outputs.append(output)
        return job

    return run


def _run_rank(body: Body, environment: Mapping[str, str], timeouts: Timeouts, output: Path) -> NoReturn:
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)

    def join() -> int:
        with join_group(environment=environment, timeouts=timeouts) as group:
            os.write(1, b"joined\n")
            body(group)
        return 0

    options = Namespace(verbose=0, quiet=False)
    code = run_program("msn-eval", (), lambda arguments: (options, join), loggers=(), kept="Kept.")
    sys.stderr.flush()
    output.with_suffix(".left").write_text(f"{time.monotonic()}")
    os._exit(code)


def sleep(group: Group) -> None:
    time.sleep(15)


def codes(results: Sequence[RankResult]) -> list[int]:
    return [result.code for result in results]


def messages(results: Sequence[RankResult]) -> list[list[str]]:
    return [[line for line in result.lines if line != "joined"] for result in results]


@pytest.fixture
def launcher_store() -> Iterator[int]:
    """Return the port of a store that no rank holds."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield int(store.port)
    del store


def launcher_environment(attempt: int) -> dict[str, str]:
    return {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt)}


# Shares.


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("block", [1, 3, 64])
def test_shares_cover_every_row_once_in_complete_blocks_and_differ_by_at_most_one(world: int, block: int) -> None:
    for items in {0, 1, world - 1, world, world + 1, 997}:
        shares = [
            split_across_ranks(items, replace(ALONE, rank=rank, world=world), block=block) for rank in range(world)
        ]
        blocks = [-(-len(rows) // block) for rows in shares]

        assert [row for rows in shares for row in rows] == list(range(items))
        assert max(blocks) - min(blocks) <= 1
        assert all(len(rows) % block == 0 or rows.stop == items for rows in shares)


# Joining.


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"MASTER_ADDR": "a", "LOCAL_RANK": "3"}])
def test_without_a_launcher_the_group_has_one_rank(environment: dict[str, str]) -> None:
    with join_group(environment=environment) as group:
        barrier(group, "end")
        check_equal_across_ranks(group, "the plan", {"weights": "a"})

        assert (group.rank, group.world, group.local_rank) == (0, 1, 0)
        assert broadcast_from_rank0(group, "choice", lambda: "this") == "this"
        assert all_gather_object(group, "names", "me") == ["me"]


def test_missing_ranks_are_named(start: Start) -> None:
    results = start(4, sleep, ranks=[0, 2], timeouts=replace(PATIENT, join_seconds=0.5)).wait()

    assert codes(results) == [31, 31]
    assert results[0].lines[0].startswith("DistributedError: rank 0 of 4 waited 0.5 s at 127.0.0.1:")
    assert results[0].lines[0].endswith("without ranks 1, 3")
    assert "joined" not in results[0].output


def test_a_store_that_cannot_be_reached_is_named(start: Start) -> None:
    port = free_port()

    (result,) = start(2, sleep, ranks=[1], port=port, timeouts=replace(PATIENT, join_seconds=0.5)).wait()

    assert result.code == 31
    assert f"rank 1 of 2 waited 0.5 s at 127.0.0.1:{port}, which was not reached: " in result.output


def test_a_port_that_another_program_uses_is_named(start: Start) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]

        (result,) = start(2, sleep, ranks=[0], port=port, timeouts=replace(PATIENT, join_seconds=0.5)).wait()

    assert result.code == 31
    assert f"could not be opened at 127.0.0.1:{port}" in result.output
    assert "choose another MASTER_PORT" in result.output


def test_a_rank_cannot_join_twice(start: Start) -> None:
    port = free_port()
    first = start(2, lambda group: time.sleep(1), port=port)
    first.wait_until_joined()

    (second,) = start(2, sleep, ranks=[1], port=port).wait()

    assert second.code == 31
    assert "rank 1 at 127.0.0.1:" in second.output
    assert f"is taken by process {first.processes[1].pid} on {socket.gethostname()}" in second.output
    assert codes(first.wait()) == [0, 0]


def test_sigterm_while_joining_ends_the_rank_at_once(start: Start) -> None:
    job = start(2, sleep, ranks=[1])
    time.sleep(0.3)

    job.send(signal.SIGTERM)

    (result,) = job.wait()
    assert (result.code, result.lines) == (75, [TERMINATED])
    assert result.seconds < 2


def test_two_groups_on_one_machine_do_not_meet(start: Start) -> None:
    def exchange(job: str) -> Body:
        return lambda group: os.write(1, " ".join(all_gather_object(group, "names", f"{job}{group.rank}")).encode())

    first, second = start(2, exchange("a")), start(2, exchange("b"))

    assert [result.lines[-1] for result in first.wait()] == ["a0 a1"] * 2
    assert [result.lines[-1] for result in second.wait()] == ["b0 b1"] * 2


def test_a_process_may_join_one_group_after_another(start: Start) -> None:
    port = free_port()

    def join_again(group: Group) -> None:
        torch.distributed.destroy_process_group()
        with join_group(environment=rank_environment(group.rank, 2, port), timeouts=QUICK) as second:
            assert all_gather_object(second, "names", group.rank) == [0, 1]

    assert codes(start(2, join_again).wait()) == [0, 0]


# Agreement.


def test_objects_are_exchanged_in_rank_order(start: Start) -> None:
    def body(group: Group) -> None:
        check_equal_across_ranks(group, "the plan", {"weights": "abc", "data": "def"})
        choice = broadcast_from_rank0(group, "choice", lambda: f"made by {group.rank}")
        names = all_gather_object(group, "names", f"é{group.rank}")
        os.write(1, json.dumps([choice, names, group.local_rank]).encode())

    results = start(4, body).wait()

    assert codes(results) == [0] * 4
    expected = [["made by 0", ["é0", "é1", "é2", "é3"], rank] for rank in range(4)]
    assert [json.loads(result.lines[-1]) for result in results] == expected


def test_differences_between_ranks_are_listed(start: Start) -> None:
    def body(group: Group) -> None:
        weights = "abc" if group.rank != 1 else "def"
        check_equal_across_ranks(
            group, "a.pth", {"data": "same", "weights": weights} | ({"seed": "1"} if group.rank == 2 else {})
        )

    results = start(3, body).wait()

    host = socket.gethostname()
    assert codes(results) == [31, 31, 31]
    assert messages(results)[0] == [
        "DistributedError: the ranks do not agree on a.pth:",
        f"  weights: abc on ranks 0, 2 ({host}); def on rank 1 ({host})",
        f"  seed: nothing on ranks 0, 1 ({host}); 1 on rank 2 ({host})",
        "Give every host the same files, options and versions.",
    ]


def test_ranks_that_exchange_different_things_fail(start: Start) -> None:
    results = start(2, lambda group: barrier(group, f"after {group.rank}")).wait()

    assert codes(results) == [31, 31]
    assert "rank 1 exchanges 'after 1', this rank 'after 0'" in results[0].output


def test_waiting_for_a_rank_that_has_left_is_an_error(start: Start) -> None:
    results = start(3, lambda group: barrier(group, "end") if group.rank != 1 else None).wait()

    assert codes(results) == [31, 0, 31]
    assert "rank 0 lost the connection to another rank" in results[0].output + results[2].output


# Endings.


@pytest.mark.parametrize("early", [0, 1])
def test_a_rank_that_finishes_early_does_not_count_as_dead(start: Start, early: int) -> None:
    def body(group: Group) -> None:
        if group.rank != early:
            time.sleep(1.6)

    results = start(3, body, timeouts=QUICK).wait()

    assert (codes(results), messages(results)) == ([0, 0, 0], [[], [], []])


def test_the_rank_that_holds_the_store_leaves_last(start: Start) -> None:
    results = start(3, lambda group: time.sleep(0.5 * group.rank)).wait()

    assert results[0].seconds > 1


def test_no_rank_waits_when_the_launcher_holds_the_store(start: Start, launcher_store: int) -> None:
    results = start(
        2, lambda group: time.sleep(0.5 * group.rank), port=launcher_store, environment=launcher_environment(0)
    ).wait()

    assert codes(results) == [0, 0]
    assert results[0].seconds < results[1].seconds - 0.2


def test_keys_of_an_earlier_attempt_are_ignored(start: Start, launcher_store: int) -> None:
    def fail(group: Group) -> None:
        raise DataError("no images")

    first = start(2, fail, port=launcher_store, environment=launcher_environment(0)).wait()
    second = start(
        2, lambda group: barrier(group, "end"), port=launcher_store, environment=launcher_environment(1)
    ).wait()

    assert (codes(first), codes(second)) == ([21, 21], [0, 0])


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_rank_ends_all_with_its_code_and_error(start: Start, failing: int) -> None:
    def body(group: Group) -> None:
        if group.rank == failing:
            raise DataError("no images", where="a/b", hint="Look there.")
        barrier(group, "end")

    results = start(3, body).wait()

    line = f"DistributedError: rank {failing} on {socket.gethostname()}: DataError: a/b: no images"
    assert codes(results) == [21, 21, 21]
    assert messages(results) == [
        ["DataError: a/b: no images", "Look there."] if rank == failing else [line] for rank in range(3)
    ]
    assert results[0].seconds < 8
    assert results[failing].seconds == min(result.seconds for result in results)


def test_a_computing_rank_is_interrupted_and_cleans_up(start: Start) -> None:
    def body(group: Group) -> None:
        if group.rank == 1:
            raise ValueError("a bug")
        try:
            time.sleep(15)
        finally:
            os.write(1, b"tidied up\n")

    results = start(2, body).wait()

    assert codes(results) == [1, 1]
    assert messages(results)[0] == [
        "tidied up",
        f"DistributedError: rank 1 on {socket.gethostname()}: ValueError: a bug",
    ]


def test_a_rank_that_cannot_be_interrupted_is_ended(start: Start) -> None:
    def body(group: Group) -> None:
        if group.rank == 1:
            raise DataError("no images")
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # as deaf as a long native loop
        sleep(group)

    results = start(2, body).wait()

    assert codes(results) == [21, 21]
    assert messages(results)[0] == [f"DistributedError: rank 1 on {socket.gethostname()}: DataError: no images"]
    assert results[0].seconds < 8


def test_an_error_of_all_ranks_is_printed_once_by_the_lowest(start: Start) -> None:
    def body(group: Group) -> None:
        time.sleep(0.02 * (3 - group.rank))
        raise DataError("no such folder", where="a/b", hint="Look there.")

    results = start(4, body, timeouts=CALM).wait()

    host = socket.gethostname()
    others = [[f"DistributedError: rank {rank} on {host} failed as rank 0 did"] for rank in (1, 2, 3)]
    assert codes(results) == [21] * 4
    assert messages(results) == [["DataError: a/b: no such folder", "Look there."], *others]


def test_a_later_error_is_one_line(start: Start) -> None:
    def body(group: Group) -> None:
        time.sleep(0.15 * group.rank)
        raise (ValueError("a bug\nof two lines") if group.rank else DataError("no images"))

    results = start(2, body, timeouts=CALM).wait()

    line = f"DistributedError: rank 1 on {socket.gethostname()} failed after rank 0: ValueError: a bug"
    assert (codes(results), messages(results)) == ([21, 1], [["DataError: no images"], [line]])


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_ends_all(start: Start, number: int, lost: int) -> None:
    job = start(3, sleep, timeouts=QUICK)
    job.wait_until_joined()

    job.send(number, lost)

    results = job.wait()  # of a stopped rank too: another one continues it, and it ends
    lost_code = -9 if number == signal.SIGKILL else 31
    assert codes(results) == [lost_code if rank == lost else 31 for rank in range(3)]
    name = f"rank {lost} ({socket.gethostname()})"
    output = "".join(result.output for rank, result in enumerate(results) if rank != lost)
    assert f"DistributedError: {name}{', which holds the store at 127.0.0.1:' if lost == 0 else ''}" in output
    assert ("is gone" if lost == 0 and number == signal.SIGKILL else "gave no heartbeat for 1 s") in output
    assert "Finished work is kept" in output


def test_ranks_that_were_all_stopped_continue(start: Start) -> None:
    job = start(3, lambda group: time.sleep(1), timeouts=QUICK)
    job.wait_until_joined()
    job.send(signal.SIGSTOP)
    time.sleep(1.5)

    job.send(signal.SIGCONT, 0)
    time.sleep(0.2)  # in which the first finds nothing new from the others
    job.send(signal.SIGCONT, 1, 2)

    assert codes(job.wait()) == [0, 0, 0]


def test_sigterm_to_all_ranks_ends_them_at_once_without_an_error(start: Start) -> None:
    job = start(3, lambda group: barrier(group, "end") if group.rank else sleep(group))
    job.wait_until_joined()
    sent = time.monotonic()

    job.send(signal.SIGTERM)

    results = job.wait()
    assert (codes(results), messages(results)) == ([75] * 3, [[TERMINATED]] * 3)
    assert time.monotonic() - sent < 4


def test_sigterm_to_one_rank_ends_all(start: Start) -> None:
    job = start(3, sleep)
    job.wait_until_joined()

    job.send(signal.SIGTERM, 1)

    results = job.wait()
    line = f"DistributedError: rank 1 on {socket.gethostname()} was told to stop. Finished work is kept;"
    assert codes(results) == [75] * 3
    assert [results[0].lines[-1].startswith(line), results[1].lines[-1], len(messages(results)[2])] == [
        True,
        TERMINATED,
        1,
    ]


def test_a_rank_that_is_stopped_after_a_failure_names_that_failure(start: Start) -> None:
    """A launcher ends the rest by SIGTERM as soon as one has failed."""

    def body(group: Group) -> None:
        if group.rank == 1:
            raise DataError("no images")
        sleep(group)

    job = start(2, body, timeouts=replace(PATIENT, linger_seconds=10))
    job.processes[1].join(10)

    job.send(signal.SIGTERM, 0)

    results = job.wait()
    assert codes(results) == [21, 21]
    assert messages(results)[0] == [f"DistributedError: rank 1 on {socket.gethostname()}: DataError: no images"]
    assert results[0].seconds < 9


def test_child_processes_do_not_disturb_the_group(start: Start) -> None:
    def body(group: Group) -> None:
        batches = DataLoader(torch.arange(8), batch_size=2, num_workers=2)  # type: ignore[arg-type]
        assert [int(batch.sum()) for batch in batches] == [1, 5, 9, 13]
        child = multiprocessing.get_context("fork").Process(target=sys.exit)
        child.start()
        child.join(5)
        assert child.exitcode == 0
        barrier(group, "end")

    results = start(2, body).wait()

    assert (codes(results), messages(results)) == ([0, 0], [[], []])


def test_torchrun_starts_a_group(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\n"
        "from msn_eval.distributed.group import all_gather_object, check_equal_across_ranks, join_group\n"
        "from msn_eval.errors import MsnEvalError\n"
        "try:\n"
        "    with join_group() as group:\n"
        "        names = all_gather_object(group, 'names', f'r{group.rank}of{group.world}')\n"
        "        os.write(1, f'{names}\\n'.encode())\n"
        "        check_equal_across_ranks(group, 'the plan', {'weights': str(group.rank)})\n"
        "except MsnEvalError as error:\n"
        "    print(error, file=sys.stderr, flush=True)\n"
        "    raise SystemExit(error.exit_code)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    assert done.returncode != 0
    assert done.stdout.splitlines() == ["['r0of2', 'r1of2']"] * 2
    assert done.stderr.count("the ranks do not agree on the plan:") == 1
