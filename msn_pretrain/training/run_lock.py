"""Run lock: one job in a run folder at a time."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msn_eval.errors import DistributedError

_log = logging.getLogger(__name__)
_NAME = "run.lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which the system takes back when this process ends, however it ends.

    A lock by fcntl is this process's alone: a loader's worker that outlives it holds nothing.
    Raises DistributedError naming host and process that hold it. On disks without locks it warns and goes on: no file
    of a run depends on it.
    """
    with (run / _NAME).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise DistributedError(
                    f"is being trained in by {_holder(run / _NAME)}",
                    where=str(run),
                    remedy="Wait for it or end it, or give another run.dir.",
                ) from error
            _log.warning("%s: this disk has no locks (%s); start no second job there", run, error.strerror)
        file.seek(0)
        file.truncate()
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        file.write(json.dumps(facts))
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        job = f" (job {facts['job']})" if facts["job"] else ""
        return f"process {facts['pid']} on {facts['host']}{job}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
