"""Slurm jobs: what reaches sbatch, and what a job does when its command ends or is stopped."""

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from msn_eval.distributed.slurm import CommandJob, Submitted, parse_slurm, submit, without_slurm
from msn_eval.errors import DistributedError, UsageError

_STOPPED_ONCE = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
started = pathlib.Path("started" + rank)
if started.exists():
    pathlib.Path("finished" + rank).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
started.with_suffix(".new").write_text(str(os.getppid()))
started.with_suffix(".new").rename(started)
"""
_PRINTS_ENVIRONMENT = """
import json, os, pathlib
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MSN_EVAL_DATA")
values = {name: os.environ.get(name) for name in names} | {"folder": os.getcwd()}
pathlib.Path(f"environment{values['RANK']}.json").write_text(json.dumps(values))
"""
Submit = Callable[..., Submitted]


@pytest.fixture
def submit_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submit]:
    """Return a function that submits a script to this machine, from a temporary folder."""
    monkeypatch.chdir(tmp_path)
    jobs: list[Submitted] = []

    def start(code: str, options: str = "cluster=local", *arguments: str) -> Submitted:
        script = tmp_path / "script.py"
        script.write_text(code)
        jobs.append(
            submit(arguments, parse_slurm(options), folder=tmp_path / "slurm", command=(sys.executable, str(script)))
        )
        return jobs[-1]

    yield start
    for job in jobs:
        job.job.cancel()
        wait_for(job.job.done)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def results(job: Submitted) -> list[int]:
    """Return the results of a job; submitit itself polls slowly."""
    wait_for(job.job.done)
    return job.job.results()


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file to which a fake sbatch copies its script."""
    taken = tmp_path / "taken.sh"
    for name, code in (("srun", ""), ("sbatch", f'cp "$1" {taken}; echo Submitted batch job 17')):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{code}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return taken


def sbatch_flags(script: Path) -> Mapping[str, str]:
    lines = script.read_text().splitlines()
    pairs = [line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partition=gpu", {"cluster": "slurm", "name": "msn-eval", "timeout_min": 240, "tasks_per_node": 1}),
        ("nodes=2,gpus_per_node=8", {"nodes": 2, "gpus_per_node": 8, "tasks_per_node": 8}),
        ("gpus_per_node=0", {"tasks_per_node": 1}),
        ("gpus_per_node=4, tasks_per_node=2", {"tasks_per_node": 2}),
        ("cluster=local, timeout_min=30, name=mine", {"cluster": "local", "timeout_min": 30, "name": "mine"}),
        ("mem_gb=1.5,exclusive=true", {"mem_gb": 1.5, "exclusive": True}),
        ("exclude=a1,a2,gres=gpu:8", {"exclude": "a1,a2", "gres": "gpu:8"}),
    ],
)
def test_options_have_defaults_and_the_types_that_submitit_expects(text: str, expected: dict[str, object]) -> None:
    options = parse_slurm(text)

    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize("text", ["gpu", "", "partition=", "nodes=1,nodes=2"])
def test_text_that_is_not_a_list_of_keys_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not key=value, or is given twice"):
        parse_slurm(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton=gpu", "no key 'partiton'. Did you mean partition?"),
        ("cluster=local,nodes=two", '"nodes" expected type'),
        ("cluster=slrm", "slrm"),
        ("cluster=local,nodes=2", "one node"),
    ],
)
def test_options_that_submitit_refuses_are_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        submit([], parse_slurm(text), folder=tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("slurm", [["--slurm", "nodes=2"], ["--slurm=nodes=2"]])
def test_the_submitted_command_has_no_slurm_option(slurm: list[str]) -> None:
    assert without_slurm(["--data", "x", *slurm, "-q"]) == ["--data", "x", "-q"]


def test_sbatch_receives_the_options(sbatch: Path, tmp_path: Path) -> None:
    options = parse_slurm("partition=gpu,nodes=2,gpus_per_node=8,exclude=a1,a2,signal_delay_s=60,mem_gb=1.5")

    submit(["--checkpoint", "pixels"], options, folder=tmp_path / "slurm")

    flags = sbatch_flags(sbatch)
    assert {name: flags[name] for name in flags if name not in ("output", "error", "open-mode", "wckey")} == {
        "partition": "gpu", "nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "8", "time": "240", "mem": "1536MB",
        "exclude": "a1,a2", "job-name": "msn-eval", "signal": "USR2@60",
    }  # fmt: skip


@pytest.mark.parametrize("options", ["nodes=2", "nodes=2,folder=mine"])
def test_a_submitted_job_is_named_with_its_logs(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(tmp_path)

    submitted = submit([], parse_slurm(options), folder=tmp_path / "slurm")

    logs = tmp_path / ("mine" if "mine" in options else "slurm")
    assert submitted.job_id == "17"
    assert submitted.logs == tuple(logs / f"17_{task}_log.{end}" for task in (0, 1) for end in ("out", "err"))


def test_a_job_submitted_from_a_job_does_not_inherit_its_rank(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/env\necho Submitted batch job 17\n")
    monkeypatch.setenv("RANK", "3")

    submit([], parse_slurm("nodes=1"), folder=tmp_path / "slurm")

    assert "RANK=3" not in (tmp_path / "env").read_text().splitlines()


def test_without_slurm_the_hint_offers_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DistributedError) as caught:
        submit([], parse_slurm("nodes=1"), folder=tmp_path / "slurm")
    assert "srun" in str(caught.value)
    assert "cluster=local" in caught.value.hint


def test_an_error_of_sbatch_is_shown(sbatch: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho invalid partition specified: gpu >&2; exit 1\n")
    with pytest.raises(DistributedError, match="invalid partition specified: gpu"):
        submit([], parse_slurm("partition=gpu"), folder=tmp_path / "slurm")


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        submit([], parse_slurm("cluster=local"), folder=tmp_path / "file" / "slurm")
    assert str(tmp_path / "file" / "slurm") in str(caught.value)


def test_a_missing_submitit_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError) as caught:
        submit([], parse_slurm("nodes=1"), folder=tmp_path)
    assert "msn-eval[slurm]" in caught.value.hint


def test_a_job_runs_msn_eval_to_its_end(tmp_path: Path) -> None:
    submitted = submit(["ls", "subsets"], parse_slurm("cluster=local"), folder=tmp_path)

    assert results(submitted) == [0]
    assert "5imgs" in submitted.logs[0].read_text()


def test_a_job_fails_with_the_code_of_its_command_and_its_error_is_in_the_log(submit_script: Submit) -> None:
    submitted = submit_script("import sys; sys.exit('DataError: no such folder')")

    with pytest.raises(Exception, match="rank 0 ended with exit code 1"):
        results(submitted)
    assert "DataError: no such folder" in submitted.logs[1].read_text()


def test_every_rank_has_its_variables_and_the_folder_of_the_submission(
    submit_script: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSN_EVAL_DATA", "digits")
    monkeypatch.setenv("MASTER_PORT", "1")

    submitted = submit_script(_PRINTS_ENVIRONMENT, "cluster=local,tasks_per_node=2")

    assert results(submitted) == [0, 0]
    first, second = (json.loads((tmp_path / f"environment{rank}.json").read_text()) for rank in (0, 1))
    port = first["MASTER_PORT"]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MSN_EVAL_DATA": "digits"}
    assert first == shared | {"RANK": "0", "LOCAL_RANK": "0", "folder": str(tmp_path)}
    assert second == shared | {"RANK": "1", "LOCAL_RANK": "1", "folder": str(tmp_path)}
    assert int(port) > 1024


def test_a_preempted_job_stops_its_command_and_continues_later(submit_script: Submit, tmp_path: Path) -> None:
    submitted = submit_script(_STOPPED_ONCE + "time.sleep(60)")
    wait_for((tmp_path / "started0").exists)

    os.kill(int((tmp_path / "started0").read_text()), signal.SIGUSR2)

    assert results(submitted) == [0]
    assert (tmp_path / "finished0").exists()


def test_ranks_that_received_sigterm_are_requeued_together(submit_script: Submit, tmp_path: Path) -> None:
    stopped = _STOPPED_ONCE + "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"

    submitted = submit_script(stopped, "cluster=local,tasks_per_node=2")

    assert results(submitted) == [0, 0]
    assert all((tmp_path / f"finished{rank}").exists() for rank in (0, 1))


def test_the_signal_of_preemption_does_not_kill_the_command(submit_script: Submit) -> None:
    submitted = submit_script("import os, signal, time; os.kill(os.getpid(), signal.SIGUSR2); time.sleep(0.1)")

    assert results(submitted) == [0]


def test_a_command_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('up', 'w'); time.sleep(60)"
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "1")
    job = CommandJob(command=(sys.executable, "-c", ignoring), stop_seconds=0.3)

    def stop(number: int, frame: object) -> None:
        job.checkpoint()

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(DistributedError) as caught:
            job()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert f"exit code {-signal.SIGKILL}" in str(caught.value)
