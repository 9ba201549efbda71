import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

OnRanks = Callable[..., list[Any]]


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
