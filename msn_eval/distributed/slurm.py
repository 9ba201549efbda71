"""Slurm: the same command as a job of submitit, one process per GPU, requeued when it is preempted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import PREEMPTED, DistributedError, UsageError, did_you_mean

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission

Value = str | int | float | bool
# submitit's own timeout is five minutes. After each timeout the job continues from what is finished.
_DEFAULTS: dict[str, Value] = {"cluster": "slurm", "name": "msn-eval", "timeout_min": 240}
_LIMITS = {"slurm_max_num_timeout": 20, "local_max_num_timeout": 20}


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A submitted job: its id, stdout and stderr of every rank, and submitit's handle."""

    job_id: str
    logs: tuple[Path, ...]
    job: "Job[int]" = field(repr=False)


def parse_slurm(text: str) -> dict[str, Value]:
    """Read `key=value,…` with submitit's keys; a piece without `=` belongs to the value before it, as in a list of nodes."""
    options: dict[str, str] = {}
    key = ""
    for piece in text.split(","):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if equals and value and name not in options:
            key, options[name] = name, value
        elif key and name and not equals:
            options[key] += f",{name}"
        else:
            what = f"--slurm: {piece!r} is not key=value, or is given twice"
            raise UsageError(what, hint="Separate them by commas, as in partition=gpu,nodes=2,gpus_per_node=8.")
    parameters: dict[str, Value] = _DEFAULTS | {name: _read_value(value) for name, value in options.items()}
    return {"tasks_per_node": parameters.get("gpus_per_node") or 1} | parameters


def _read_value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() else float(text) if text.replace(".", "", 1).isdecimal() else text


def without_slurm(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command without --slurm and its value."""
    kept = [argument for argument in arguments if not argument.startswith("--slurm=")]
    if "--slurm" in kept:
        index = kept.index("--slurm")
        del kept[index : index + 2]
    return kept


def submit(
    arguments: Sequence[str],
    options: Mapping[str, Value],
    *,
    folder: Path,
    command: Sequence[str] = (sys.executable, "-m", "msn_eval"),
) -> Submitted:
    """Submit `command arguments` with the current folder and environment; submitit's files go to `folder`, on a shared disk.

    Raises:
        UsageError: submitit is missing or refuses the options.
        DistributedError: The cluster refuses the job.
    """
    try:
        import submitit
        from submitit.helpers import clean_env
    except ImportError as error:
        raise UsageError("--slurm needs submitit, which is missing", hint="pip install 'msn-eval[slurm]'") from error
    parameters = dict(options)
    cluster, folder = str(parameters.pop("cluster")), Path(str(parameters.pop("folder", folder))).absolute()
    generic = set(submitit.AutoExecutor._valid_parameters())
    known = generic | submitit.SlurmExecutor._valid_parameters()
    if unknown := [key for key in parameters if key not in known]:
        text = f"--slurm: no key {unknown[0]!r}.{did_you_mean(unknown[0], known)}"
        raise UsageError(text, hint=f"Known keys: cluster, folder, {', '.join(sorted(known))}.")
    try:
        with clean_env():  # this process may itself be part of a job
            executor = submitit.AutoExecutor(folder, cluster=cluster, **_LIMITS)
            executor.update_parameters(**{k if k in generic else f"slurm_{k}": v for k, v in parameters.items()})
            job = executor.submit(CommandJob(command=(*command, *arguments)))
    except (OSError, ValueError, AssertionError) as error:
        raise UsageError(f"--slurm: submitit refuses the options: {error}", hint="Change that key.") from error
    except RuntimeError as error:
        hint = "Submit from a machine of the Slurm cluster; cluster=local runs the job on this one."
        raise DistributedError(f"the job could not be submitted: {error}", hint=hint) from error
    tasks = [job.task(number) for number in range(job.num_tasks)]
    logs = dict.fromkeys(path for task in tasks for path in (task.paths.stdout, task.paths.stderr))
    return Submitted(job_id=job.job_id, logs=tuple(logs), job=job)


@dataclass(kw_only=True)
class CommandJob:
    """A command that submitit runs once per rank, as a process of its own, which ends as it would in a terminal."""

    command: tuple[str, ...]
    stop_seconds: float = 20.0  # to save its work when it is preempted
    settle_seconds: float = 60.0  # for Slurm to end or requeue a job that it stopped
    _child: "subprocess.Popen[bytes] | None" = field(default=None, init=False, repr=False)

    def __call__(self) -> int:
        """Run the command to its end and return 0; raise DistributedError if it fails."""
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        ranks = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if ranks.local_world_size == ranks.world_size:  # a host need not know its own name
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        # Slurm sends the signal of preemption to every process of the job, but only this one handles it.
        preemption = signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {preemption})
        self._child = subprocess.Popen(self.command)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while (code := self._child.poll()) is None:  # submitit calls `checkpoint` in a signal handler on top of this
            time.sleep(0.05)
        if code == PREEMPTED:
            if ranks.rank != 0:  # submitit lets only the first rank requeue
                raise SystemExit(0)
            if JobEnvironment().cluster == "slurm":  # it may requeue the job itself, or the user cancelled it
                time.sleep(self.settle_seconds)
            os.kill(os.getpid(), preemption)
            time.sleep(self.stop_seconds)
        if code:
            raise DistributedError(f"rank {ranks.rank} ended with exit code {code}; see its log")
        return 0

    def checkpoint(self) -> "DelayedSubmission":
        """Stop the command, and return the job to put back into the queue; submitit calls this on preemption."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(self.stop_seconds)
            except subprocess.TimeoutExpired:
                self._child.kill()
        return DelayedSubmission(replace(self))
