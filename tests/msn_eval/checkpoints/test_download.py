import contextlib
import errno
import hashlib
import io
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.utils
import pytest

from msn_eval.checkpoints import download as module
from msn_eval.checkpoints.download import download
from msn_eval.errors import CheckpointError, StoreError

CONTENT = b"PK\x03\x04" + random.Random(1).randbytes(400_000)
OTHER = b"PK\x03\x04" + random.Random(2).randbytes(400_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = 200_000


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "weights" / "file.pth"


def fetch(server: Any, target: Path) -> str:
    return download(server.url, target, hint="Download it manually.")


def parts(target: Path) -> list[Path]:
    return list(target.parent.glob(".*.part"))


@pytest.fixture
def part(server: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The partial file of a download that failed half-way."""
    server.cuts = [HALF]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_PAUSES_SECONDS", ())
        with pytest.raises(CheckpointError):
            fetch(server, target)
    server.ranges.clear()
    (path,) = parts(target)
    return path


# One process, one call


def test_download_writes_the_file_and_returns_its_hash(server: Any, target: Path) -> None:
    assert fetch(server, target) == SHA256
    assert (target.read_bytes(), parts(target)) == (CONTENT, [])


def test_file_that_exists_is_not_downloaded(server: Any, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(OTHER)
    assert (fetch(server, target), server.ranges) == (hashlib.sha256(OTHER).hexdigest(), [])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again_a_few_times(server: Any, target: Path, status: int) -> None:
    server.errors = [status, status]
    assert fetch(server, target) == SHA256
    server.errors = [status] * 99
    with pytest.raises(CheckpointError, match=f"HTTP {status}"):
        fetch(server, target.with_name("second"))
    assert len(server.ranges) < 15


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_refusal_names_address_and_hint_without_a_retry(server: Any, target: Path, status: int) -> None:
    server.errors = [status] * 5
    with pytest.raises(CheckpointError) as caught:
        fetch(server, target)
    what, hint = str(caught.value).splitlines()
    assert what.startswith(f"{server.url}: Download failed: HTTP {status} ")
    assert (hint, len(server.ranges)) == ("Download it manually.", 1)


def test_retries_start_again_whenever_an_attempt_receives_more(server: Any, target: Path) -> None:
    server.cuts = [0, 0, 100, 0, 50_000, 0, 50_000, 0, 50_000, 0, 50_000]
    assert fetch(server, target) == SHA256


def test_connection_that_receives_nothing_more_ends_the_download(server: Any, target: Path) -> None:
    server.cuts = [HALF] + [0] * 50
    with pytest.raises(CheckpointError, match="Download failed: peer closed connection") as caught:
        fetch(server, target)
    assert len(server.ranges) < 20
    assert caught.value.kept == "200,000 bytes are kept; the same command resumes the download."


def test_server_that_falls_silent_ends_the_download(server: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT_SECONDS", 0.1)
    silence = threading.Event()
    server.cuts, server.before_end = [HALF] + [0] * 50, silence.wait
    try:
        with pytest.raises(CheckpointError, match="timed out"):
            fetch(server, target)
    finally:
        silence.set()


def test_no_network_is_an_error_at_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with socket.socket() as closed:  # bound and not listening
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(CheckpointError, match=r"Download failed: .*refused"):
            download(f"http://127.0.0.1:{closed.getsockname()[1]}/x", target, hint="")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "data:text/plain,x", "", "http://[x/"])
@pytest.mark.parametrize("is_redirect", [False, True])
def test_address_outside_the_web_is_refused(server: Any, target: Path, url: str, is_redirect: bool) -> None:
    server.redirect = url or "http://"
    with pytest.raises(CheckpointError, match="Download failed"):
        download(server.url if is_redirect else url, target, hint="")


def test_redirect_from_https_to_http_is_refused(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def redirected(*_: object, **__: object) -> Iterator[object]:
        yield SimpleNamespace(url=huggingface_hub.utils.httpx.URL("http://example.org/a"), history=())

    monkeypatch.setattr(huggingface_hub.utils, "http_stream_backoff", redirected)
    with pytest.raises(CheckpointError, match="redirected from https to http:"):
        download("https://example.org/a", target, hint="")


def test_redirect_is_followed_with_the_range(server: Any, target: Path) -> None:
    server.redirect, server.cuts = server.url.replace("file", "moved"), [HALF]
    assert fetch(server, target) == SHA256
    assert server.ranges[-1] == f"bytes={HALF}-"


def test_unknown_length_is_refused(server: Any, target: Path) -> None:
    server.states_length = False
    with pytest.raises(CheckpointError, match="does not state the file size"):
        fetch(server, target)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"", "the file is empty"),
    ],
)
def test_page_instead_of_the_file_is_refused(server: Any, target: Path, content: bytes, what: str) -> None:
    server.content = content
    with pytest.raises(CheckpointError, match=f"is not a checkpoint: .*{what}"):
        fetch(server, target)
    assert (parts(target), target.exists()) == ([], False)


def test_file_is_synced_before_its_rename_and_the_folder_after(
    server: Any, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []  # size of the file, -1 for a folder; whether the final name existed
    sync = os.fsync

    def record(handle: int) -> None:
        status = os.fstat(handle)
        synced.append((-1 if stat.S_ISDIR(status.st_mode) else status.st_size, target.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", record)
    fetch(server, target)
    assert synced[-2:] == [(len(CONTENT), False), (-1, True)]


def test_progress_is_drawn_on_a_terminal_alone(
    server: Any, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(server, target)
    assert capsys.readouterr() == ("", "")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(server, target.with_name("second.pth"))
    assert "second.pth" in terminal.getvalue()


# Partial files


@pytest.mark.parametrize(
    ("headers", "content", "query"),
    [
        ({"ETag": '"two"'}, OTHER, ""),
        ({"ETag": 'W/"one"'}, OTHER, ""),
        ({"Last-Modified": "Thu"}, OTHER, ""),
        ({}, OTHER, ""),
        ({"ETag": '"one"'}, OTHER + b"more", ""),
        ({"ETag": '"one"'}, OTHER, "?other"),
    ],
    ids=["tag", "weak tag", "date", "no validator", "length", "address"],
)
def test_changed_file_is_never_joined_to_the_old_half(
    server: Any, target: Path, part: Path, headers: dict[str, str], content: bytes, query: str
) -> None:
    server.content, server.headers = content, headers
    download(server.url + query, target, hint="")
    assert (target.read_bytes(), parts(target)) == (content, [])


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_file_that_changes_during_the_download_is_downloaded_again(
    server: Any, target: Path, knows_if_range: bool
) -> None:
    server.knows_if_range = knows_if_range

    def change_at_the_range() -> None:  # after the headers of the second attempt promised the old file
        if len(server.ranges) == 3:
            server.content, server.headers = OTHER, {"ETag": '"two"'}

    server.cuts, server.before_answer = [HALF], change_at_the_range
    fetch(server, target)
    assert target.read_bytes() == OTHER


def test_last_modified_identifies_a_version_without_an_etag(server: Any, target: Path) -> None:
    server.headers, server.cuts = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, [HALF]
    assert fetch(server, target) == SHA256
    assert server.ranges[-1] == f"bytes={HALF}-"


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_version_without_a_strong_validator_starts_again(server: Any, target: Path, headers: dict[str, str]) -> None:
    server.headers, server.cuts = headers, [HALF]
    assert fetch(server, target) == SHA256
    assert (server.ranges, parts(target)) == ([None, None], [])


@pytest.mark.parametrize("behaviour", [{"knows_ranges": False}, {"sends_all_as_a_range": True}])
def test_server_that_ignores_the_range_starts_again(server: Any, target: Path, behaviour: dict[str, bool]) -> None:
    vars(server).update(behaviour)
    server.cuts = [HALF]
    assert fetch(server, target) == SHA256
    assert server.ranges == [None, None, f"bytes={HALF}-", None]


def test_partial_file_longer_than_the_file_is_overwritten(server: Any, target: Path, part: Path) -> None:
    part.write_bytes(OTHER + OTHER)
    assert fetch(server, target) == SHA256


@pytest.mark.parametrize(
    ("size", "ranges"), [(HALF, [None, f"bytes={HALF}-"]), (len(CONTENT), [None])], ids=["half", "complete"]
)
def test_later_call_downloads_only_what_is_missing(
    server: Any, target: Path, part: Path, size: int, ranges: list[str | None]
) -> None:
    part.write_bytes(CONTENT[:size])
    assert (fetch(server, target), server.ranges, parts(target)) == (SHA256, ranges, [])


def test_partial_file_from_before_a_restart_is_not_resumed(server: Any, target: Path, part: Path) -> None:
    """A power cut may have torn it."""
    before_the_start = time.time() - time.monotonic() - 3600
    os.utime(part, (before_the_start, before_the_start))
    assert (fetch(server, target), server.ranges) == (SHA256, [None])


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (
            OSError(errno.ENOSPC, "No space left"),
            StoreError,
            r"No space left.*\n.*bytes are free.*\n200,000 bytes are kept",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full disk", "interrupt"],
)
def test_failure_while_writing_keeps_the_partial_file(
    server: Any, target: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type, text: str | None
) -> None:
    def write_half(part: Path, *_: object) -> None:
        part.write_bytes(CONTENT[:HALF])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "_complete", write_half)
        with pytest.raises(raised, match=text):
            fetch(server, target)
    assert (fetch(server, target), server.ranges[-1]) == (SHA256, f"bytes={HALF}-")


# Several processes

PROGRAM = """
import sys
from pathlib import Path
from msn_eval.checkpoints.download import download
print(download(sys.argv[1], Path(sys.argv[2]), hint=""))
"""
WITHOUT_LOCKS = """
import fcntl
fcntl.flock = lambda *arguments: None
"""


def start(server: Any, target: Path, program: str = PROGRAM) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, server.url, str(target)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_process_is_resumed_by_the_next(server: Any, target: Path) -> None:
    killed = threading.Event()
    server.cuts, server.before_end = [HALF], killed.wait
    with start(server, target) as child:
        end = time.monotonic() + 30
        while not any(path.stat().st_size >= HALF - 8192 for path in parts(target)):
            assert time.monotonic() < end
            time.sleep(1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        killed.set()
    assert not target.exists()
    (left,) = parts(target)
    received = left.stat().st_size
    assert fetch(server, target) == SHA256
    assert (server.ranges, target.read_bytes()) == ([None, None, f"bytes={received}-"], CONTENT)


@pytest.mark.parametrize("has_part", [False, True])
def test_two_processes_at_once_download_the_file_once(
    server: Any, target: Path, request: pytest.FixtureRequest, has_part: bool
) -> None:
    if has_part:
        request.getfixturevalue("part")
    with start(server, target) as first, start(server, target) as second:
        outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert outputs == [(f"{SHA256}\n", "")] * 2
    assert (len(server.ranges), parts(target), target.read_bytes()) == (1 + has_part, [], CONTENT)


@pytest.mark.parametrize("has_part", [False, True])
def test_two_processes_without_a_working_lock_both_end_with_a_good_file(
    server: Any, target: Path, request: pytest.FixtureRequest, has_part: bool
) -> None:
    """Lustre and some NFS mounts grant every lock."""
    if has_part:
        request.getfixturevalue("part")
    both = threading.Barrier(2, timeout=30)
    server.before_answer = lambda: both.wait() if len(server.ranges) <= 2 else None  # neither is ahead of the other
    server.cuts = [] if has_part else [HALF, HALF]
    program = WITHOUT_LOCKS + PROGRAM
    with start(server, target, program) as first, start(server, target, program) as second:
        outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert outputs == [(f"{SHA256}\n", "")] * 2
    assert (parts(target), target.read_bytes()) == ([], CONTENT)
