"""SIGKILL at random instants of an evaluation: nothing torn, nothing lost, the same records."""

import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="runs are forked, and watched by Linux's /proc"
)
RunScript = Callable[..., tuple[int, str]]
_HARNESS = Path(__file__).parent / "kill_evaluation.py"
_IMAGES_A_CLASS = {"train": 3, "val": 8}
_CLASSES = 40


@pytest.fixture(scope="module")
def pictures(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the first few images of some classes of Tiny ImageNet as a folder."""
    root = tmp_path_factory.mktemp("tiny")
    taken: Counter[str] = Counter()
    classes: set[str] = set()
    with tarfile.open(shared_data / "tinyimagenet100.tar.gz") as archive:
        for member in archive:
            split, _, rest = member.name.partition("/")
            name = rest.partition("/")[0]
            if len(classes) < _CLASSES and member.isfile():
                classes.add(name)
            folder = member.name.rpartition("/")[0]
            if name in classes and taken[folder] < _IMAGES_A_CLASS.get(split, 0):
                taken[folder] += 1
                archive.extract(member, root, filter="data")
    return root


def test_a_run_that_is_killed_loses_nothing(pictures: Path, run_script: RunScript) -> None:
    code, told = run_script(_HARNESS, "--data", str(pictures), "--kills", "6")

    assert (code, told.splitlines()[-1]) == (0, "6 of 6 trials sound"), told


def test_writing_without_care_is_caught(pictures: Path, run_script: RunScript) -> None:
    code, told = run_script(_HARNESS, "--data", str(pictures), "--kills", "2", "--torn-writes")

    assert code == 1, told
    assert "is torn" in told
