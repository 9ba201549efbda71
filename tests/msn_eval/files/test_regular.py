"""Files that would never end are refused, whatever reads them."""

import os
import socket
from pathlib import Path

import pytest

from msn_eval.files.regular import read_regular_file


def test_regular_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")

    assert read_regular_file(tmp_path / "link", most_bytes=7) == b"content"


def test_larger_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 2**40)

    with pytest.raises(OSError, match="it is larger than 1,000 bytes"):
        read_regular_file(tmp_path / "huge", most_bytes=1000)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe", "not a regular file"),
        ("socket", "No such device"),
        ("folder", "Is a directory"),
        ("loop", "Too many levels"),
        ("/dev/zero", "not a regular file"),
        ("/dev/null", "not a regular file"),
    ],
)
def test_other_kinds_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")

        with pytest.raises(OSError, match=reason):
            read_regular_file(Path(name))
