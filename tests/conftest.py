import logging
from collections.abc import Iterator
from pathlib import Path

import pytest


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
def package_logger() -> Iterator[None]:
    """Give the package's logger back as it was: a command that ran in this process sends it to stderr alone."""
    logger = logging.getLogger("msn_eval")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
