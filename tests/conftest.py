import fcntl
import logging
import multiprocessing
import os
import runpy
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

OnRanks = Callable[..., list[Any]]
RunScript = Callable[..., tuple[int, str]]
Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Give the folder of real images and lists that stands beside the repository, or skip the test."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images and lists at {folder}")
    return folder


@pytest.fixture(scope="session")
def digits_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a result folder: raw pixels on the digits, every probe, 1 and 2 images a class."""
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
    """Give a function that has a folder filled by the first of all test processes that asks for its name; the others wait."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # xdist's workers have theirs side by side

    def filled(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return filled


@pytest.fixture(autouse=True)
def package_loggers() -> Iterator[None]:
    """Give the packages' loggers as they are at first: commands that run in this process send them to stderr alone,
    those that fixtures of a whole module run too."""
    _reset_loggers()
    yield
    _reset_loggers()


def _reset_loggers() -> None:
    for name in ("msn_eval", "msn_pretrain"):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def on_ranks(tmp_path: Path) -> Iterator[OnRanks]:
    """Give a function that calls `body(*arguments)` in as many processes of one gloo group, and gives what each returned."""
    fork = multiprocessing.get_context("fork")  # the child of a process that has torch needs no import
    processes = []

    def run(body: Callable[..., object], *arguments: object, world: int = 2) -> list[Any]:
        import torch

        meeting, outputs = (
            tmp_path / f"meeting-{len(processes)}",
            [tmp_path / f"{len(processes)}-{n}" for n in range(world)],
        )
        for rank, output in enumerate(outputs):
            processes.append(fork.Process(target=_be_one_of, args=(rank, world, meeting, output, body, arguments)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # other tests leave threads behind
                processes[-1].start()
        for process in processes[-world:]:
            process.join(100)
            assert process.exitcode == 0
        return [torch.load(output, weights_only=False) for output in outputs]

    yield run
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _be_one_of(
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
def run_script(tmp_path: Path) -> Iterator[RunScript]:
    """Give a function that runs a script with some words as `python script words…` would, in a fork of this process, which has
    torch and all else loaded already; it gives the exit code, and what was printed to stdout and stderr."""
    fork = multiprocessing.get_context("fork")
    processes = []

    def run(script: Path, *words: str, seconds: float = 280) -> tuple[int, str]:
        output = tmp_path / f"script-{len(processes)}"
        process = fork.Process(target=_be_script, args=(script, words, output))
        processes.append(process)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other tests leave threads behind
            process.start()
        process.join(seconds)
        assert process.exitcode is not None, output.read_text()
        return process.exitcode, output.read_text()

    yield run
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _be_script(script: Path, words: Sequence[str], output: Path) -> None:
    import threadpoolctl

    code: object = 1
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    try:
        threadpoolctl.threadpool_limits(1)  # the threads of the parent did not come along
        warnings.resetwarnings()
        sys.argv[:] = [str(script), *words]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
