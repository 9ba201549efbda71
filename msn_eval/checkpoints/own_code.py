"""Own code: what a user's or a plug-in's network may do while it runs. It may neither end the process nor write to stdout."""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from msn_eval.errors import CheckpointError
from msn_eval.process import describe_exhausted_resource


@contextlib.contextmanager
def guard_own_code(what: str, *, where: str) -> Iterator[None]:
    """Run code that is not ours in the block: its output goes to stderr, and its errors and exits are CheckpointErrors.

    `os._exit` raises in the thread of the block; in its threads and child processes it ends the process as usual. An exit from
    native code cannot be caught.

    Args:
        what: What runs, for the error.
        where: The checkpoint.

    Raises:
        CheckpointError: The code raised an error or asked to exit, whatever the code. Exhausted memory and errors of
            torch.compile stay as they are, since a smaller batch or another option helps.
    """
    owner, leave = (os.getpid(), threading.get_ident()), os._exit

    def refuse_exit(status: int) -> NoReturn:
        if (os.getpid(), threading.get_ident()) != owner:
            leave(status)
        raise SystemExit(status)

    try:
        with _stdout_to_stderr():
            os._exit = refuse_exit
            yield
    except (KeyboardInterrupt, CheckpointError):
        raise
    except SystemExit as error:
        hint = "A checkpoint's code must not end the program. Remove the call of sys.exit, exit, quit or os._exit."
        raise CheckpointError(f"{what} exits with {error.code!r}", where=where, hint=hint) from error
    except BaseException as error:
        is_compiling = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if is_compiling or describe_exhausted_resource(error) is not None:
            raise
        text = f"{what} failed: {type(error).__name__}: {error}"
        raise CheckpointError(text, where=where, hint="Run it by itself to see why.") from error
    finally:
        os._exit = leave


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect what Python, native code and child processes write to stdout."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C's stdio still holds belongs to stderr as well
        os.dup2(saved, 1)
        os.close(saved)
