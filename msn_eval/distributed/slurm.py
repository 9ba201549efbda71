"""Submitted: the same command as a Slurm job, one process a GPU, put back into the queue when it is preempted.

A job is a small picklable callable that submitit runs once for each rank. It starts the command as a process of its own,
so that a rank ends as it would in a terminal, with the environment by which ranks find each other.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import DistributedError, UsageError, did_you_mean, printable

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

_PREEMPTED = 75
_CLUSTERS = ("slurm", "local", "debug")
# What submitit takes under these names on every cluster; the rest it hands to sbatch alone.
_GENERIC = frozenset(
    ["timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "name", "stderr_to_stdout"]
)
_WHOLE = frozenset(
    [
        "timeout_min",
        "nodes",
        "cpus_per_task",
        "gpus_per_node",
        "tasks_per_node",
        "cpus_per_gpu",
        "gpus_per_task",
        "signal_delay_s",
    ]
)
_WORDS = frozenset(
    [
        "name",
        "partition",
        "qos",
        "mem_per_gpu",
        "mem_per_cpu",
        "comment",
        "constraint",
        "exclude",
        "account",
        "gres",
        "mail_type",
        "mail_user",
        "nodelist",
        "dependency",
        "exclusive",
        "wckey",
    ]
)
SLURM_KEYS = tuple(sorted({"cluster", "folder", "mem_gb", "stderr_to_stdout"} | _WHOLE | _WORDS))
_DEFAULT_TIMEOUT_MINUTES = 240  # submitit's own is five minutes
_MOST_TIMEOUTS = 20  # every one is a start from what is finished
_CARRIED_PREFIX = "MSN_EVAL_"
_CARRIED = {
    "PYTHONPATH",
    "XDG_CACHE_HOME",
    "TORCH_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
}
_LAST_LINES = 20  # of stderr, that a failed job shows
_POLL_SECONDS = 0.05
_ORPHANS_SECONDS = 2.0  # that processes which the command leaves behind may hold its stderr


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What `--slurm` says.

    cluster:    slurm, local (processes of this machine) or debug (this process)
    folder:     for submitit's files, None: the caller's choice
    parameters: by the names that submitit's AutoExecutor takes
    """

    cluster: str
    folder: Path | None
    parameters: Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job in the queue.

    logs: stdout and stderr of every rank
    job:  submitit's own handle
    """

    job_id: str
    logs: tuple[Path, ...]
    job: "Job[int]" = field(repr=False)


def parse_slurm(text: str) -> SlurmOptions:
    """Read `key=value,…`; a piece without `=` belongs to the value before it, as in a list of nodes.

    Raises UsageError for a key that is not known or a value that is none.
    """
    given: dict[str, str] = {}
    key = ""
    for piece in text.split(","):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if equals:
            key = name
            if key not in SLURM_KEYS:
                raise _refused(f"there is no key {key!r}.{did_you_mean(key, SLURM_KEYS)}")
            if key in given:
                raise _refused(f"{key} is given twice.")
            given[key] = value
        elif key in _WORDS:
            given[key] += f",{name}"
        else:
            raise _refused(f"{name!r} is not of the form key=value.")
    cluster = given.pop("cluster", "slurm")
    if cluster not in _CLUSTERS:
        raise _refused(f"there is no cluster {cluster!r}.{did_you_mean(cluster, _CLUSTERS)}")
    folder = given.pop("folder", None)
    parameters: dict[str, str | int | float | bool] = {"name": "msn-eval", "timeout_min": _DEFAULT_TIMEOUT_MINUTES}
    parameters |= {name: _value(name, value) for name, value in given.items()}
    parameters.setdefault("tasks_per_node", parameters.get("gpus_per_node") or 1)
    return SlurmOptions(cluster=cluster, folder=Path(folder) if folder else None, parameters=parameters)


def _value(name: str, text: str) -> str | int | float | bool:
    if not text:
        raise _refused(f"{name} has no value.")
    if name in _WHOLE:
        least = 0 if name in ("gpus_per_node", "gpus_per_task") else 1
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise _refused(f"{name}={text}: not a whole number of at least {least}.")
        return int(text)
    if name == "mem_gb":
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise _refused(f"{name}={text}: not a number above 0.")
        return number
    if name == "stderr_to_stdout" and text not in ("true", "false"):
        raise _refused(f"{name}={text}: neither true nor false.")
    if name == "stderr_to_stdout" or (name, text) == ("exclusive", "true"):
        return text == "true"
    return text


def _refused(what: str) -> UsageError:
    return UsageError(f"--slurm: {what}", hint=f"Known keys: {', '.join(SLURM_KEYS)}.")


def without_slurm(words: Sequence[str]) -> list[str]:
    """Give the words of a command without --slurm and its value."""
    kept: list[str] = []
    follows = False
    for word in words:
        if follows or word == "--slurm" or word.startswith("--slurm="):
            follows = word == "--slurm" and not follows
            continue
        kept.append(word)
    return kept


def submit(
    arguments: Sequence[str],
    options: SlurmOptions,
    *,
    folder: Path,
    command: Sequence[str] = (sys.executable, "-m", "msn_eval"),
) -> Submitted:
    """Submit `command arguments` from here, with the folder and the environment of this process.

    arguments: without --slurm
    folder:    for submitit's pickles and logs, unless the options name one; on a disk that all nodes see
    Raises UsageError where submitit is missing or refuses the options, DistributedError where the cluster refuses the job.
    """
    try:
        import submitit
        from submitit.helpers import clean_env
    except ImportError as error:
        raise UsageError(
            "--slurm needs submitit, which is not installed", hint="pip install 'msn-eval[slurm]'"
        ) from error
    job = CommandJob(
        command=(*command, *arguments),
        folder=str(Path.cwd()),
        environment={name: value for name, value in os.environ.items() if _is_carried(name)},
    )
    parameters = {name if name in _GENERIC else f"slurm_{name}": value for name, value in options.parameters.items()}
    place = (options.folder or folder).absolute()
    try:
        with clean_env():  # this process may itself be part of a job
            executor = submitit.AutoExecutor(
                folder=place,
                cluster=options.cluster,
                slurm_max_num_timeout=_MOST_TIMEOUTS,
                local_max_num_timeout=_MOST_TIMEOUTS,
            )
            executor.update_parameters(**parameters)
            handle = executor.submit(job)
    except OSError as error:
        raise UsageError(
            f"--slurm: {error.strerror or error}", where=str(place), hint="Name another folder=."
        ) from error
    except (ValueError, NameError, AssertionError) as error:
        raise UsageError(
            f"--slurm: submitit refuses the options: {error}", hint="Change or leave out that key."
        ) from error
    except RuntimeError as error:
        raise DistributedError(
            f"the job could not be submitted: {error}",
            hint="Submit from a machine of the Slurm cluster; cluster=local runs the job on this one.",
        ) from error
    if options.cluster == "debug":
        handle.results()
    tasks = [handle.task(number) for number in range(handle.num_tasks)]
    logs = dict.fromkeys(path for task in tasks for path in (task.paths.stdout, task.paths.stderr))
    return Submitted(job_id=handle.job_id, logs=tuple(logs), job=handle)


def _is_carried(name: str) -> bool:
    # By name: submitit writes them to a file on a shared disk, where tokens and passwords have no place.
    return name.startswith(_CARRIED_PREFIX) or name in _CARRIED


@dataclass(kw_only=True)
class CommandJob:
    """A command as submitit runs it, once for each rank.

    folder:         that it runs in
    environment:    of the submission, over that of the node
    stop_seconds:   that it has to save what it did, when it is preempted
    settle_seconds: that Slurm has to end or put back a job whose command was told to stop, before the job asks for that
    """

    command: tuple[str, ...]
    folder: str
    environment: Mapping[str, str]
    stop_seconds: float = 20.0
    settle_seconds: float = 60.0
    _child: "subprocess.Popen[bytes] | None" = field(default=None, init=False, repr=False)
    _code: int | None = field(default=None, init=False, repr=False)

    def __call__(self) -> int:
        """Run the command to its end and give its exit code, 0.

        Raises DistributedError with the last lines of its stderr when it failed.
        """
        from submitit.helpers import TorchDistributedEnvironment

        ranks = TorchDistributedEnvironment()
        last_lines: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._child = self._start(ranks)
        reader = threading.Thread(target=_pass_on_stderr, args=(self._child, last_lines), daemon=True)
        reader.start()
        threading.Thread(target=self._wait_for_end, args=(self._child, reader), daemon=True).start()
        try:
            # Without a lock, unlike Popen.wait: submitit calls `checkpoint` from a signal handler on top of this frame.
            while self._code is None:
                time.sleep(_POLL_SECONDS)
        finally:
            if self._code is None:
                self._child.terminate()
        if self._code == _PREEMPTED:
            self._ask_to_be_requeued(ranks.rank)
        if self._code:
            text = printable(b"".join(last_lines).decode("utf-8", "replace").strip())
            error = DistributedError(f"rank {ranks.rank} ended with exit code {self._code}:\n{text}")
            error.exit_code = self._code if self._code > 0 else DistributedError.exit_code
            raise error
        return 0

    def checkpoint(self) -> "DelayedSubmission":
        """Stop the command, and give the job as it is to be put back: all that is finished is on disk."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None and self._code is None:
            self._child.terminate()
            until = time.monotonic() + self.stop_seconds
            while self._code is None and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
            if self._code is None:
                self._child.kill()
        return DelayedSubmission(replace(self))

    def _start(self, ranks: "TorchDistributedEnvironment") -> "subprocess.Popen[bytes]":
        environment = os.environ | self.environment | {
            "RANK": str(ranks.rank),
            "WORLD_SIZE": str(ranks.world_size),
            "LOCAL_RANK": str(ranks.local_rank),
            "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
            # A host need not know its own name.
            "MASTER_ADDR": "127.0.0.1" if ranks.local_world_size == ranks.world_size else ranks.master_addr,
            "MASTER_PORT": str(ranks.master_port),
        }  # fmt: skip
        # Slurm sends the signal of preemption to every process of the job; it is this one's to act on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {_preemption_signal()})
        try:
            return subprocess.Popen(self.command, cwd=self.folder, env=environment, stderr=subprocess.PIPE)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _wait_for_end(self, child: "subprocess.Popen[bytes]", reader: threading.Thread) -> None:
        code = child.wait()
        reader.join(timeout=_ORPHANS_SECONDS)
        self._code = code

    def _ask_to_be_requeued(self, rank: int) -> None:
        """Have the job put back, as preemption would; ends this process.

        A command that was told to stop is not one that failed. Where Slurm told it, it soon ends the job too, and puts it
        back or, where a person cancelled it, does not; only where nothing comes does the job itself ask for it.
        """
        from submitit import JobEnvironment

        if rank != 0:  # submitit lets the first rank alone ask
            raise SystemExit(0)
        if JobEnvironment().cluster == "slurm":
            time.sleep(self.settle_seconds)
        os.kill(os.getpid(), _preemption_signal())
        time.sleep(self.stop_seconds)


def _pass_on_stderr(child: "subprocess.Popen[bytes]", last_lines: "deque[bytes]") -> None:
    assert child.stderr is not None
    with child.stderr:
        for line in child.stderr:
            last_lines.append(line)
            sys.stderr.buffer.write(line)
            sys.stderr.flush()


def _preemption_signal() -> signal.Signals:
    from submitit import JobEnvironment

    return signal.Signals[f"SIG{JobEnvironment.USR_SIG}"]
