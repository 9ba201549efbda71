"""SIGKILL at random moments of an evaluation: no torn file, no lost result, the same records."""

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
_IMAGES_PER_CLASS = {"train": 3, "val": 8}
_CLASSES = 40


@pytest.fixture(scope="module")
def pictures(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a few images of some classes of Tiny ImageNet."""
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
            if name in classes and taken[folder] < _IMAGES_PER_CLASS.get(split, 0):
                taken[folder] += 1
                archive.extract(member, root, filter="data")
    return root


def test_a_killed_run_loses_nothing(pictures: Path, run_script: RunScript) -> None:
    code, output = run_script(_HARNESS, "--data", str(pictures), "--kills", "6")

    assert (code, output.splitlines()[-1]) == (0, "6 of 6 trials passed"), output


def test_writing_in_place_is_detected(pictures: Path, run_script: RunScript) -> None:
    code, output = run_script(_HARNESS, "--data", str(pictures), "--kills", "2", "--torn-writes")

    assert code == 1, output
    assert "is torn" in output
