"""The process: its available memory, its stop signals and its parent."""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from msn_eval import process
from msn_eval.process import Terminated, affordable_workers, available_bytes, limit_spinning, watch_stop_signals


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    500 kB\n")
    return file


def container(folder: Path, *, limit: str, used: int = 0, cached: int = 0) -> Path:
    folder = folder / "cgroup"
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")
    return folder


@pytest.mark.parametrize(
    ("ranks", "free_bytes", "read_only", "workers"),
    [
        (1, 10**9, False, 4),
        (1, 10**7, False, 3),  # of 3 MB and the locks each
        (2, 10**7, False, 1),
        (1, 10**6, False, 0),
        (1, 10**9, True, 0),
    ],
)
def test_loader_processes_fit_into_shared_memory(
    ranks: int, free_bytes: int, read_only: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = SimpleNamespace(f_bavail=free_bytes, f_frsize=1, f_flag=os.ST_RDONLY if read_only else 0)
    monkeypatch.setattr(os, "statvfs", lambda path: status)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    assert affordable_workers(4, batch_bytes=10**6) == workers


def test_available_memory_of_the_machine(machine: Path, tmp_path: Path) -> None:
    assert available_bytes(machine=machine, container=tmp_path / "none") == 500 * 1024


def test_container_may_have_less(machine: Path, tmp_path: Path) -> None:
    limited = container(tmp_path, limit="3000", used=2000, cached=500)
    assert available_bytes(machine=machine, container=limited) == 1500


def test_container_without_a_limit_has_the_machines_memory(machine: Path, tmp_path: Path) -> None:
    assert available_bytes(machine=machine, container=container(tmp_path, limit="max")) == 500 * 1024


def test_container_above_its_limit_has_nothing(machine: Path, tmp_path: Path) -> None:
    assert available_bytes(machine=machine, container=container(tmp_path, limit="100", used=200)) == 0


def test_without_the_kernels_files_memory_is_unknown(tmp_path: Path) -> None:
    assert available_bytes(machine=tmp_path / "none", container=tmp_path / "none") is None


def _raise_terminated(number: int, frame: object) -> None:
    raise Terminated


@pytest.fixture
def sigterm_raises() -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    yield
    signal.signal(signal.SIGTERM, previous)


def _receive(*numbers: int, accept: bool = False) -> int:
    with watch_stop_signals() as stop:
        for number in numbers:
            signal.raise_signal(number)
        assert stop.requested
        return stop.accept() if accept else 0


@pytest.mark.usefixtures("sigterm_raises")
def test_an_accepted_stop_signal_gives_its_exit_code() -> None:
    assert _receive(signal.SIGTERM, signal.SIGTERM, accept=True) == 75  # launchers send it twice
    assert _receive(signal.SIGINT, accept=True) == 130


@pytest.mark.usefixtures("sigterm_raises")
def test_other_stop_signals_are_raised_again_after_the_body() -> None:
    with pytest.raises(Terminated):
        _receive(signal.SIGTERM)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        _receive(signal.SIGINT, signal.SIGINT, accept=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at the end of the parent is Linux's")
def test_a_process_ends_with_its_killed_parent() -> None:
    child = "import time; from msn_eval.process import terminate_with_parent; terminate_with_parent()"
    child += "; print('ready', flush=True); time.sleep(99)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"

        started.kill()

        assert started.stdout.read() == ""  # returns when the child, which holds the other end, has ended


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "10000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_NUM_THREADS": "1"}, "10000"),
    ],
)
def test_idle_threads_sleep_early_unless_the_user_says_otherwise(given: dict[str, str], spins: str | None) -> None:
    environment = dict(given)

    limit_spinning(environment)

    assert environment == given | ({} if spins is None else {"GOMP_SPINCOUNT": spins})


def test_program_limits_spinning_before_torch_is_imported() -> None:
    code = (
        "import os, sys; import msn_eval.cli; msn_eval.cli.main(['ls', 'probes', '-q']);"
        "assert os.environ['GOMP_SPINCOUNT'] == '10000' and 'torch' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP", "KMP"))}

    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


_COUNT_PAGE_FAULTS = """
import resource, sys
from msn_eval.process import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
bytearray(2**26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(2**26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have rules of their own")
def test_memory_that_was_freed_is_used_again_without_new_pages() -> None:
    faults = {}
    for choice in ("default", "kept"):
        command = [sys.executable, "-c", _COUNT_PAGE_FAULTS, choice]
        faults[choice] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults["kept"] < faults["default"] / 4


@pytest.mark.parametrize(("ranks", "cores"), [(None, 16), ("1", 16), ("8", 2), ("32", 1), ("many", 16), ("0", 16)])
def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch, ranks: str | None, cores: int) -> None:
    monkeypatch.setattr(process, "usable_cores", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert process.cores_per_rank() == cores
