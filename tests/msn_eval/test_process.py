"""Host: the smaller of what the machine and the container leave."""

from pathlib import Path

import pytest

from msn_eval.process import available_bytes


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


def test_machine_tells_what_is_available(machine: Path, tmp_path: Path) -> None:
    assert available_bytes(machine=machine, container=tmp_path / "none") == 500 * 1024


def test_container_may_leave_less(machine: Path, tmp_path: Path) -> None:
    limited = container(tmp_path, limit="3000", used=2000, cached=500)
    assert available_bytes(machine=machine, container=limited) == 1500


def test_container_without_a_limit_leaves_what_the_machine_has(machine: Path, tmp_path: Path) -> None:
    assert available_bytes(machine=machine, container=container(tmp_path, limit="max")) == 500 * 1024


def test_container_above_its_limit_leaves_nothing(machine: Path, tmp_path: Path) -> None:
    assert available_bytes(machine=machine, container=container(tmp_path, limit="100", used=200)) == 0


def test_system_that_tells_nothing_has_no_answer(tmp_path: Path) -> None:
    assert available_bytes(machine=tmp_path / "none", container=tmp_path / "none") is None


@pytest.mark.parametrize("text", ["MemAvailable:\n", "MemAvailable: much kB\n", "MemTotal: 1000 kB\n"], ids=str)
def test_machine_that_tells_nonsense_has_no_answer(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert available_bytes(machine=tmp_path / "meminfo", container=tmp_path / "none") is None


@pytest.mark.parametrize(("name", "text"), [("memory.max", "much"), ("memory.stat", "anon 5\n")])
def test_container_that_tells_nonsense_is_not_asked(machine: Path, tmp_path: Path, name: str, text: str) -> None:
    limited = container(tmp_path, limit="3000", used=2000)
    (limited / name).write_text(text)
    assert available_bytes(machine=machine, container=limited) == 500 * 1024
