import errno
import hashlib
import http.server
import io
import logging
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from msn_eval.checkpoints import download as module
from msn_eval.checkpoints import download as part_module
from msn_eval.checkpoints.download import download
from msn_eval.errors import CheckpointError, MsnEvalError, StoreError, UsageError

CONTENT = b"PK\x03\x04" + random.Random(1).randbytes(400_000)
OTHER = b"PK\x03\x04" + random.Random(2).randbytes(400_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALF = 200_000


class Server:
    """A web server of one file that can be told to misbehave, and remembers which ranges were asked for."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.headers: dict[str, str] = {"ETag": '"one"'}
        self.knows_ranges = True
        self.knows_if_range = True
        self.sends_all_as_a_range = False
        self.says_length = True
        self.cuts: list[int] = []  # after how many bytes of body each answer breaks off, one after the other
        self.errors: list[int] = []  # status of each answer, until there are none left
        self.redirect = ""
        self.before_answer: Callable[[], object] = lambda: None
        self.before_end: Callable[[], object] = lambda: None
        self.asked: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                outer.asked.append(wanted)
                outer.before_answer()
                if outer.redirect and self.path == "/file.pth":
                    self.send_response(302)
                    self.send_header("Location", outer.redirect)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif outer.errors:
                    self.send_error(outer.errors.pop(0))
                else:
                    outer._answer(self, wanted)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Http(http.server.ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:  # clients that hang up are meant
                pass

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.pth"

    def _answer(self, handler: http.server.BaseHTTPRequestHandler, wanted: str | None) -> None:
        mark = self.headers.get("ETag") or self.headers.get("Last-Modified")
        fits = not self.knows_if_range or handler.headers["If-Range"] == mark
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.knows_ranges and fits else 0
        if start >= len(self.content):
            handler.send_error(416)
            return
        if self.sends_all_as_a_range:
            start = 0
        body = self.content[start:]
        partial = bool(start or (self.sends_all_as_a_range and wanted))
        handler.send_response(206 if partial else 200)
        if partial:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        for name, value in self.headers.items():
            handler.send_header(name, value)
        if self.says_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        cut = self.cuts.pop(0) if self.cuts else len(body)
        handler.wfile.write(body[:cut])
        handler.wfile.flush()
        self.before_end()
        handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "_PAUSES_SECONDS", (0.0, 0.0))
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "weights" / "file.pth"


def fetch(server: Server, target: Path, **others: str) -> str:
    return download(server.url, target, advice="Fetch it by hand.", **others)


def parts(target: Path) -> list[Path]:
    return [path for path in target.parent.iterdir() if path != target]


def leave_a_part(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a download fail half-way, and give the part that it left."""
    server.cuts = [HALF]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_PAUSES_SECONDS", ())
        with pytest.raises(CheckpointError):
            fetch(server, target)
    server.asked.clear()
    (left,) = parts(target)
    return left


def test_download_is_the_file_and_nothing_else(server: Server, target: Path) -> None:
    fetch(server, target)
    assert ([path.name for path in target.parent.iterdir()], target.read_bytes()) == (["file.pth"], CONTENT)


def test_download_gives_the_hash_of_the_whole(server: Server, target: Path) -> None:
    assert fetch(server, target) == SHA256


def test_known_hash_is_accepted_in_capitals(server: Server, target: Path) -> None:
    assert fetch(server, target, sha256=SHA256.upper()) == SHA256


def test_other_hash_is_refused_with_both(server: Server, target: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"400,004 bytes came with SHA-256 {SHA256} instead of 0{{64}}"
    ) as caught:
        fetch(server, target, sha256="0" * 64)
    assert caught.value.exit_code == 20
    assert list(target.parent.iterdir()) == []


def test_refused_hash_leaves_the_earlier_file(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"earlier")
    with pytest.raises(CheckpointError):
        fetch(server, target, sha256="0" * 64)
    assert target.read_bytes() == b"earlier"


def test_error_names_address_and_advice(server: Server, target: Path) -> None:
    server.errors = [404]
    with pytest.raises(CheckpointError) as caught:
        fetch(server, target)
    assert str(caught.value).splitlines() == [
        f"{server.url}: could not be downloaded: HTTP 404 Not Found",
        "Fetch it by hand.",
    ]


def test_missing_page_is_asked_for_once(server: Server, target: Path) -> None:
    server.errors = [404] * 5
    with pytest.raises(CheckpointError):
        fetch(server, target)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_server_is_asked_again(server: Server, target: Path, status: int) -> None:
    server.errors = [status, status]
    assert fetch(server, target) == SHA256


def test_server_that_stays_busy_is_given_up(server: Server, target: Path) -> None:
    server.errors = [500] * 9
    with pytest.raises(CheckpointError, match="HTTP 500"):
        fetch(server, target)
    assert len(server.asked) == 3


def test_lost_connection_is_resumed_where_it_broke(server: Server, target: Path) -> None:
    server.cuts = [HALF]
    assert fetch(server, target) == SHA256
    assert server.asked[-1] == f"bytes={HALF}-"


def test_server_without_an_answer_is_asked_again(server: Server, target: Path) -> None:
    silent = socket.create_server(("127.0.0.1", 0))

    def hang_up_then_serve() -> None:
        silent.accept()[0].close()
        silent.close()

    thread = threading.Thread(target=hang_up_then_serve)
    thread.start()
    with pytest.raises(CheckpointError, match="refused"):  # of the second try, when nobody listens any more
        download(f"http://127.0.0.1:{silent.getsockname()[1]}/x", target, advice="")
    thread.join()


def test_tries_start_anew_whenever_one_gets_further(server: Server, target: Path) -> None:
    server.cuts = [0, 0, 100, 0, 50_000, 0, 50_000, 0, 50_000, 0, 50_000]
    assert fetch(server, target) == SHA256


def test_connection_that_gets_no_further_is_given_up(server: Server, target: Path) -> None:
    server.cuts = [HALF] + [0] * 50
    with pytest.raises(CheckpointError, match="ended after 200,000 of 400,004 bytes") as caught:
        fetch(server, target)
    assert len(server.asked) < 10
    assert caught.value.kept == "200,000 bytes that came before are kept; the same command goes on from there."


def test_later_run_goes_on_from_the_part(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_a_part(server, target, monkeypatch)
    assert fetch(server, target) == SHA256
    assert server.asked == [None, f"bytes={HALF}-"]


def test_part_is_gone_once_the_file_is_there(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_a_part(server, target, monkeypatch)
    fetch(server, target)
    assert parts(target) == []


@pytest.mark.parametrize("headers", [{"ETag": '"two"'}, {"ETag": 'W/"one"'}, {"Last-Modified": "Thu"}, {}])
def test_changed_file_is_never_joined_to_the_old_half(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    leave_a_part(server, target, monkeypatch)
    server.content, server.headers = OTHER, headers
    fetch(server, target)
    assert target.read_bytes() == OTHER


def test_file_of_another_length_is_never_joined(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_a_part(server, target, monkeypatch)
    server.content = OTHER + b"more"
    fetch(server, target)
    assert target.read_bytes() == OTHER + b"more"


def test_file_of_another_address_is_never_joined(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_a_part(server, target, monkeypatch)
    server.content = OTHER
    download(server.url + "?other", target, advice="")
    assert target.read_bytes() == OTHER


@pytest.mark.parametrize("knows_if_range", [True, False])
def test_file_that_changes_while_it_is_fetched_is_begun_anew(
    server: Server, target: Path, knows_if_range: bool
) -> None:
    server.knows_if_range = knows_if_range

    def change_at_the_range() -> None:  # after the headers of the second try promised the old file
        if len(server.asked) == 2:
            server.content, server.headers = OTHER, {"ETag": '"two"'}

    server.cuts, server.before_end = [HALF, 0], change_at_the_range
    fetch(server, target)
    assert target.read_bytes() == OTHER


def test_last_modified_serves_where_there_is_no_etag(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.headers = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    leave_a_part(server, target, monkeypatch)
    assert fetch(server, target) == SHA256
    assert server.asked[-1] == f"bytes={HALF}-"


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_version_without_a_firm_mark_is_begun_anew(server: Server, target: Path, headers: dict[str, str]) -> None:
    server.headers, server.cuts = headers, [HALF]
    assert fetch(server, target) == SHA256
    assert server.asked == [None, None]


def test_server_that_ignores_ranges_is_begun_anew(server: Server, target: Path) -> None:
    server.knows_ranges, server.cuts = False, [HALF]
    assert fetch(server, target) == SHA256


def test_range_other_than_asked_for_is_begun_anew(server: Server, target: Path) -> None:
    server.sends_all_as_a_range, server.cuts = True, [HALF]
    assert fetch(server, target) == SHA256
    assert server.asked == [None, None, f"bytes={HALF}-", None]


def test_range_that_is_refused_is_begun_anew(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leave_a_part(server, target, monkeypatch)
    left.write_bytes(OTHER + OTHER)  # longer than the file
    assert fetch(server, target) == SHA256


def test_part_that_is_complete_is_not_fetched_again(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_a_part(server, target, monkeypatch).write_bytes(CONTENT)
    assert fetch(server, target) == SHA256
    assert server.asked == [None]


def test_damaged_part_is_found_by_the_known_hash(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_a_part(server, target, monkeypatch).write_bytes(OTHER[:HALF])
    with pytest.raises(CheckpointError, match="instead of"):
        fetch(server, target, sha256=SHA256)
    assert parts(target) == []


def test_unknown_length_without_a_known_hash_is_refused(server: Server, target: Path) -> None:
    server.says_length = False
    with pytest.raises(CheckpointError, match="does not say how long the file is"):
        fetch(server, target)


def test_unknown_length_with_a_known_hash_will_do(server: Server, target: Path) -> None:
    server.says_length = False
    assert fetch(server, target, sha256=SHA256) == SHA256


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        (b"", "the file is empty"),
    ],
)
def test_page_in_place_of_the_file_is_refused(server: Server, target: Path, content: bytes, what: str) -> None:
    server.content = content or b"\0"
    if not content:
        server.says_length, server.cuts = False, [0]
    with pytest.raises(CheckpointError, match=what):
        fetch(server, target, **({} if content else {"sha256": SHA256}))
    assert list(target.parent.iterdir()) == []


def test_redirect_is_followed_and_the_range_with_it(server: Server, target: Path) -> None:
    server.redirect, server.cuts = server.url.replace("file", "moved"), [HALF]
    assert fetch(server, target) == SHA256
    assert server.asked[-1] == f"bytes={HALF}-"


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_redirect_off_the_web_is_refused(server: Server, target: Path, place: str) -> None:
    server.redirect = place
    with pytest.raises(CheckpointError, match=r"HTTP 302 .*(not allowed|refused)"):
        fetch(server, target)


def test_redirect_from_https_to_http_is_refused() -> None:
    request = module.urllib.request.Request("https://example.org/a")
    with pytest.raises(module.urllib.error.HTTPError, match="from https to http refused") as caught:
        module._WebRedirects().redirect_request(
            request, io.BytesIO(), 302, "Found", module.http.client.HTTPMessage(), "http://example.org/a"
        )
    caught.value.close()


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/y", "/etc/passwd", "", "http://[x/", "http://h:p/", "http://a b"]
)
def test_address_that_is_none_of_the_web_is_refused(target: Path, url: str) -> None:
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        download(url, target, advice="")


def test_no_network_is_told_at_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with socket.socket() as unheard:  # bound and not listening
        unheard.bind(("127.0.0.1", 0))
        with pytest.raises(CheckpointError, match=r"could not be downloaded: .*refused"):
            download(f"http://127.0.0.1:{unheard.getsockname()[1]}/x", target, advice="")


def test_server_that_falls_silent_is_given_up(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT_SECONDS", 0.1)
    silence = threading.Event()
    server.cuts, server.before_end = [HALF, 0, 0, 0, 0, 0, 0], silence.wait
    try:
        with pytest.raises(CheckpointError, match="the connection failed after 200,000 bytes: timed out"):
            fetch(server, target)
    finally:
        silence.set()


def test_folder_that_cannot_be_made_is_a_usage_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written.*\n.*weights folder"):
        fetch(server, tmp_path / "file" / "file.pth")


def test_full_disk_is_a_store_error_that_keeps_what_came(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = CONTENT + OTHER * 4
    with monkeypatch.context() as patch:
        patch.setattr(module, "_receive", _half_then_full(server))
        with pytest.raises(StoreError, match=r"No space left.*\n.*bytes are free.*\n200,000 bytes .* kept"):
            fetch(server, target)
    fetch(server, target)
    assert server.asked[-1] == f"bytes={HALF}-"
    assert target.read_bytes() == server.content


def _half_then_full(server: Server) -> Callable[..., None]:
    def receive(answer: object, part: Path, *others: object) -> None:
        part.write_bytes(server.content[:HALF])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return receive


def test_interrupt_leaves_the_part_to_the_same_process(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(answer: object, part: Path, *others: object) -> None:
        part.write_bytes(CONTENT[:HALF])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(server, target)
    assert fetch(server, target) == SHA256
    assert server.asked[-1] == f"bytes={HALF}-"


def owned(left: Path, host: str, pid: int, changed: float = 0.0) -> Path:
    """Rename a part as if a process had been killed over it, and say when it last wrote."""
    stem = left.name.removesuffix(".part").rpartition(".")[0]
    name = left.with_name(f"{stem}.{host}.{pid}.{'0' * 8}.part")
    left.rename(name)
    if changed:
        os.utime(name, (changed, changed))
    return name


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_part_of_a_dead_process_is_gone_on_with(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owned(leave_a_part(server, target, monkeypatch), socket.gethostname(), dead_pid())
    fetch(server, target)
    assert server.asked == [None, f"bytes={HALF}-"]


def test_part_of_a_living_process_is_left_alone(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living = owned(leave_a_part(server, target, monkeypatch), socket.gethostname(), os.getpid())
    assert fetch(server, target) == SHA256
    assert (server.asked, parts(target)) == ([None], [living])


def test_part_of_another_host_is_left_alone(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = owned(leave_a_part(server, target, monkeypatch), "other.host", dead_pid())
    assert fetch(server, target) == SHA256
    assert (server.asked, parts(target)) == ([None], [foreign])


def test_part_that_a_restart_may_have_torn_is_not_gone_on_with(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_the_start = time.time() - time.monotonic() - 3600
    owned(leave_a_part(server, target, monkeypatch), socket.gethostname(), dead_pid(), before_the_start)
    assert fetch(server, target) == SHA256
    assert (server.asked, parts(target)) == ([None], [])


def test_longest_part_is_gone_on_with(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = leave_a_part(server, target, monkeypatch)
    shorter = re.sub(r"\.[0-9a-f]{8}\.part$", ".00000000.part", left.name)
    left.with_name(shorter).write_bytes(CONTENT[:10])
    fetch(server, target)
    assert server.asked[-1] == f"bytes={HALF}-"


def test_parts_of_a_longer_name_belong_to_another_file(tmp_path: Path) -> None:
    (tmp_path / f".file.pth.more.{'0' * 16}.{'0' * 8}.part").touch()
    assert part_module.find_parts(tmp_path / "file.pth") == []


def test_file_is_synced_before_it_is_named_and_its_folder_after(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []  # bytes that a file had then, -1 for a folder; whether the name was there
    sync = os.fsync

    def noting(handle: int) -> None:
        status = os.fstat(handle)
        synced.append((-1 if stat.S_ISDIR(status.st_mode) else status.st_size, target.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    fetch(server, target)
    assert synced[-2:] == [(len(CONTENT), False), (-1, True)]


PROGRAM = """
import sys
from pathlib import Path
from msn_eval.checkpoints.download import download
print(download(sys.argv[1], Path(sys.argv[2]), advice="by hand"))
"""


def start(server: Server, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, server.url, str(target)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_killed_process_is_resumed_by_the_next(server: Server, target: Path) -> None:
    killed = threading.Event()
    server.cuts, server.before_end = [HALF], killed.wait
    with start(server, target) as child:
        wait_for(lambda: target.parent.is_dir() and any(path.stat().st_size >= HALF - 8192 for path in parts(target)))
        child.send_signal(signal.SIGKILL)
        child.wait()
        killed.set()
    assert not target.exists()
    (left,) = parts(target)
    have = left.stat().st_size
    assert fetch(server, target) == SHA256
    assert (server.asked, target.read_bytes()) == ([None, None, f"bytes={have}-"], CONTENT)


@pytest.mark.parametrize("with_a_part", [False, True])
def test_two_processes_at_once_both_end_with_a_good_file(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch, with_a_part: bool
) -> None:
    if with_a_part:
        leave_a_part(server, target, monkeypatch)
    both = threading.Barrier(2, timeout=30)
    server.before_answer = lambda: both.wait() if len(server.asked) <= 2 else None  # neither is ahead of the other
    server.cuts = [] if with_a_part else [HALF, HALF]
    with start(server, target) as first, start(server, target) as second:
        said = [process.communicate(timeout=60) for process in (first, second)]
    assert said == [(f"{SHA256}\n", "")] * 2
    assert (parts(target), target.read_bytes()) == ([], CONTENT)


# Not ru_maxrss: it begins with that of the process that forked, and grows no more where that was large.
PEAK = """
from pathlib import Path
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are told by Linux alone")
def test_memory_does_not_grow_with_the_file(server: Server, target: Path) -> None:
    server.content = CONTENT * 160
    program = f"{PEAK}{PROGRAM.replace('print(', 'before = peak(); (')}print(peak() - before)"
    command = [sys.executable, "-c", program, server.url, str(target)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 0.25 * len(server.content)


def test_start_and_end_are_logged_once(server: Server, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="msn_eval"):
        fetch(server, target)
    assert [record.message.partition(" ")[0] for record in caplog.records] == ["downloading", "downloaded"]


def test_nothing_is_drawn_where_stderr_is_no_terminal(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(server, target)
    assert capsys.readouterr() == ("", "")


def test_bar_is_drawn_on_a_terminal(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    fetch(server, target)
    assert "file.pth" in sys.stderr.getvalue()


def test_every_refusal_is_one_of_ours(server: Server, target: Path) -> None:
    for status in (400, 401, 403, 404, 410, 418):
        server.errors = [status]
        with pytest.raises(MsnEvalError, match=f"HTTP {status}"):
            fetch(server, target)
