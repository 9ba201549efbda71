import fcntl
import logging
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

ForkProcess = Callable[..., BaseProcess]
OnRanks = Callable[..., list[Any]]
RunScript = Callable[..., tuple[int, str]]
Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real images and lists beside the repository, or skip the test."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images and lists at {folder}")
    return folder


@pytest.fixture(scope="session")
def digits_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a result folder: raw pixels on the digits, every probe, 1 and 2 images per class."""
    from msn_eval import evaluate

    folder = tmp_path_factory.mktemp("digits") / "runs"
    evaluate(
        ["pixels"],
        data="digits",
        subsets=["1img", "2imgs"],
        probes=["logistic", "knn", "ncm"],
        out=folder,
        device="cpu",
        no_cache=True,
    )
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return a function that fills a folder in the first of all test processes that names it; the others wait."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # xdist's workers have theirs side by side

    def fill_once(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return fill_once


@pytest.fixture(autouse=True)
def package_loggers() -> Iterator[None]:
    """Reset the packages' loggers, which commands that run in this process send to stderr only."""
    _reset_loggers()
    yield
    _reset_loggers()


def _reset_loggers() -> None:
    for name in ("msn_eval", "msn_pretrain"):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def fork_process() -> Iterator[ForkProcess]:
    """Return a function that starts `target(*arguments)` in a fork of this process, which needs no imports."""
    fork = multiprocessing.get_context("fork")
    processes = []

    def start(target: Callable[..., None], *arguments: object) -> BaseProcess:
        process = fork.Process(target=target, args=arguments)
        processes.append(process)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other tests leave threads behind
            process.start()
        return process

    yield start
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


@pytest.fixture
def on_ranks(tmp_path: Path, fork_process: ForkProcess) -> OnRanks:
    """Return a function that calls `body(*arguments)` in the processes of one gloo group, and returns their results."""

    def run(body: Callable[..., object], *arguments: object, world: int = 2) -> list[Any]:
        import torch

        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        outputs = [folder / f"{rank}" for rank in range(world)]
        meeting = folder / "meeting"
        processes = [
            fork_process(_run_rank, rank, world, meeting, output, body, arguments)
            for rank, output in enumerate(outputs)
        ]
        for process in processes:
            process.join(100)
            assert process.exitcode == 0
        return [torch.load(output, weights_only=False) for output in outputs]

    return run


def _run_rank(
    rank: int, world: int, meeting: Path, output: Path, body: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    import torch
    from torch import distributed

    code = 1
    try:
        torch.set_num_threads(1)  # the threads of the parent did not come along
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        torch.save(body(*arguments), output)
        distributed.barrier()
        code = 0
    except Exception as error:
        os.write(2, f"rank {rank}: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)  # no hook of the parent's tests runs in the child


@pytest.fixture
def run_script(tmp_path: Path, fork_process: ForkProcess) -> RunScript:
    """Return a function that runs `python script arguments…` in a fork of this process; it returns the exit code and output."""

    def run(script: Path, *arguments: str, seconds: float = 280) -> tuple[int, str]:
        output = Path(tempfile.mkdtemp(dir=tmp_path)) / "output"
        process = fork_process(_run_script, script, arguments, output)
        process.join(seconds)
        assert process.exitcode is not None, output.read_text()
        return process.exitcode, output.read_text()

    return run


def _run_script(script: Path, arguments: Sequence[str], output: Path) -> None:
    import threadpoolctl

    code: object = 1
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    try:
        threadpoolctl.threadpool_limits(1)  # the threads of the parent did not come along
        warnings.resetwarnings()
        sys.argv[:] = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
