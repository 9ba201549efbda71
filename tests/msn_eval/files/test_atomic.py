import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import msn_eval
from msn_eval.errors import StoreError, UsageError
from msn_eval.files.atomic import prepare_folder, write_atomically, written_atomically

DAY = 24 * 3600


def run_python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in another process that finds this package."""
    environment = os.environ | {"PYTHONPATH": str(Path(msn_eval.__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def dead_process() -> int:
    """Return the id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def leave(folder: Path, name: str, *, age_seconds: float = 2 * DAY) -> Path:
    """Create a file of a certain age."""
    path = folder / name
    path.write_bytes(b"half")
    then = time.time() - age_seconds
    os.utime(path, (then, then))
    return path


def temporary_name(*, host: str | None = None, pid: int | None = None) -> str:
    return f".record.json.{host or socket.gethostname()}.{dead_process() if pid is None else pid}.0a1b2c3d.tmp"


def refuse_to_sync(monkeypatch: pytest.MonkeyPatch, code: int, *, folders_only: bool = False) -> None:
    sync = os.fsync

    def refuse(handle: int) -> None:
        if folders_only and not stat.S_ISDIR(os.fstat(handle).st_mode):
            return sync(handle)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)


def test_content_replaces_the_old_and_nothing_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"old and longer")
    write_atomically(tmp_path / "record.json", b"new")
    assert everything_in(tmp_path) == {"record.json": b"new"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of syncs and renames. A kill proves nothing about a power cut; the order of the calls does."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def record_sync(handle: int) -> None:
        status = os.fstat(handle)
        done.append("folder synced" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes synced")
        sync(handle)

    def record_replace(path: Path, target: Path) -> Path:
        done.append(f"{path.name} renamed to {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return done


def test_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, calls: list[str]) -> None:
    for _ in range(2):
        write_atomically(tmp_path / "record.json", b"content")
    assert [call.partition(" ")[2] for call in calls] == ["bytes synced", "renamed to record.json", "synced"] * 2
    assert calls[1] != calls[4]  # two writers never share a temporary file


def test_full_disk_is_a_store_error_and_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "record.json").write_bytes(b"old")
    refuse_to_sync(monkeypatch, errno.ENOSPC)
    with pytest.raises(StoreError) as caught:
        write_atomically(tmp_path / "record.json", bytes(1234))
    assert caught.value.exit_code == 22
    assert str(caught.value).startswith(
        f"{tmp_path / 'record.json'}: could not write 1,234 bytes: No space left on device\nFree space"
    )
    assert f"bytes are free at {tmp_path}" in caught.value.hint
    assert everything_in(tmp_path) == {"record.json": b"old"}


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from msn_eval.files.atomic import write_atomically
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"new")
"""


def test_kill_while_writing_leaves_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b"old")
    child = run_python(KILLED_WHILE_WRITING, tmp_path / "record.json")
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "record.json").read_bytes() == b"old"


def test_leftover_of_a_killed_writer_is_removed_a_day_later(tmp_path: Path) -> None:
    run_python(KILLED_WHILE_WRITING, tmp_path / "record.json")
    (left,) = tmp_path.iterdir()
    leave(tmp_path, left.name)
    prepare_folder(tmp_path, option="--out")
    assert list(tmp_path.iterdir()) == []


def test_file_system_that_cannot_sync_folders_still_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems answer EINVAL; the file has its name by then, so an error would be untrue."""
    refuse_to_sync(monkeypatch, errno.EINVAL, folders_only=True)
    write_atomically(tmp_path / "record.json", b"new")
    assert (tmp_path / "record.json").read_bytes() == b"new"


# Files and folders that a block fills


def fill(path: Path, *, folder: bool, content: bytes = b"new") -> None:
    if folder:
        path.mkdir()
        (path / "config.json").write_bytes(content)
        (path / "weights").write_bytes(content)
    else:
        path.write_bytes(content)


def fill_and_fail(path: Path, error: BaseException, *, folder: bool) -> None:
    fill(path, folder=folder)
    raise error


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("folder", "content"),
    [(False, {"out": b"new"}), (True, {"out/config.json": b"new", "out/weights": b"new"})],
    ids=["file", "folder"],
)
def test_filled_file_or_folder_has_its_name_after_the_block(
    tmp_path: Path, folder: bool, content: dict[str, bytes]
) -> None:
    with written_atomically(tmp_path / "out", "3 bytes") as temporary:
        fill(temporary, folder=folder)
        exists = (tmp_path / "out").exists()
    assert (exists, everything_in(tmp_path)) == (False, content)


def test_folder_does_not_replace_one_with_content(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_bytes(b"mine")
    with pytest.raises(StoreError), written_atomically(tmp_path / "out", "6 bytes") as temporary:
        fill(temporary, folder=True)
    assert everything_in(tmp_path) == {"out/mine": b"mine"}


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("mine"), ValueError),
        (KeyboardInterrupt("mine"), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "mine"), StoreError),
    ],
)
def test_error_inside_the_block_leaves_the_old_content_alone(
    tmp_path: Path, folder: bool, error: BaseException, raised: type[BaseException]
) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(raised, match="mine"), written_atomically(tmp_path / "out", "3 bytes") as temporary:
        fill_and_fail(temporary, error, folder=folder)
    assert everything_in(tmp_path) == {"out": b"old"}


def test_every_file_of_a_folder_is_on_disk_before_the_folder_gets_its_name(tmp_path: Path, calls: list[str]) -> None:
    with written_atomically(tmp_path / "out", "6 bytes") as temporary:
        fill(temporary, folder=True)
    assert calls[:2] == ["3 bytes synced", "3 bytes synced"]
    assert calls[2].endswith("renamed to out")


def test_file_instead_of_the_folder_is_a_usage_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(UsageError) as caught:
        prepare_folder(tmp_path / "runs", option="--out")
    assert caught.value.exit_code == 2
    text = "is the name of a file, not of a folder\nGive another --out folder. Tables are printed by"
    assert str(caught.value).startswith(f"{tmp_path / 'runs'}: {text}")


def test_folder_on_a_full_disk_is_a_store_error_and_stays_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_sync(monkeypatch, errno.ENOSPC)
    with pytest.raises(StoreError, match="cannot be written: No space left on device"):
        prepare_folder(tmp_path, option="--out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["node7", "node7.cluster.example"])
@pytest.mark.parametrize("folder", [False, True])
def test_old_temporary_file_or_folder_of_a_dead_process_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, folder: bool
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    leftover = tmp_path / temporary_name()
    fill(leftover, folder=folder)
    os.utime(leftover, (0, 0))
    prepare_folder(tmp_path, option="--out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "age_seconds"),
    [({"pid": os.getpid()}, 2 * DAY), ({}, DAY - 600), ({"host": f"not-{socket.gethostname()}"}, 2 * DAY)],
    ids=["living process", "young file", "another host"],
)
def test_temporary_file_that_may_be_in_use_is_kept(tmp_path: Path, name: dict[str, Any], age_seconds: float) -> None:
    leftover = leave(tmp_path, temporary_name(**name), age_seconds=age_seconds)
    prepare_folder(tmp_path, option="--out")
    assert leftover.exists()


@pytest.mark.parametrize(
    "name",
    [
        ".notes.tmp",
        "record.json.tmp",
        f".a.{socket.gethostname()}.pid.0a1b2c3d.tmp",
        f".a.{socket.gethostname()}.{10**20}.0a1b2c3d.tmp",
    ],
    ids=["no process", "not a dotfile", "not a number", "number too large"],
)
def test_file_that_only_resembles_a_temporary_one_is_kept(tmp_path: Path, name: str) -> None:
    left = leave(tmp_path, name)
    prepare_folder(tmp_path, option="--out")
    assert left.exists()
