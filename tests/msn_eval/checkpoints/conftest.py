import http.server
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest


class FileServer:
    """A web server of one file, at every path, that can misbehave and records the requested paths and ranges."""

    def __init__(self) -> None:
        self.content = b"PK\x03\x04" + random.Random(1).randbytes(400_000)
        self.headers: dict[str, str] = {"ETag": '"one"'}
        self.knows_ranges = True
        self.knows_if_range = True
        self.sends_all_as_a_range = False
        self.states_length = True
        self.cuts: list[int] = []  # bytes of the body after which each response breaks off, in order
        self.errors: list[int] = []  # status of each response, until the list is empty
        self.redirect = ""
        self.before_answer: Callable[[], object] = lambda: None
        self.before_end: Callable[[], object] = lambda: None
        self.ranges: list[str | None] = []
        self.paths: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.ranges.append(self.headers["Range"])
                outer.paths.append(self.path)
                outer.before_answer()
                if outer.redirect and self.path == "/file.pth":
                    self.send_response(302)
                    self.send_header("Location", outer.redirect)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                elif outer.errors:
                    self.send_error(outer.errors.pop(0))
                else:
                    outer._answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Http(http.server.ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:  # clients may hang up
                pass

        self.http = Http(("127.0.0.1", 0), Handler)
        self.host = f"http://127.0.0.1:{self.http.server_port}"
        self.url = f"{self.host}/file.pth"

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        requested = handler.headers["Range"]
        validator = self.headers.get("ETag") or self.headers.get("Last-Modified")
        matches = not self.knows_if_range or handler.headers["If-Range"] == validator
        start = int(requested[len("bytes=") : -1]) if requested and self.knows_ranges and matches else 0
        if start >= max(len(self.content), 1):
            handler.send_error(416)
            return
        if self.sends_all_as_a_range:
            start = 0
        body = self.content[start:]
        is_partial = bool(start or (self.sends_all_as_a_range and requested))
        handler.send_response(206 if is_partial else 200)
        if is_partial:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        for name, value in self.headers.items():
            handler.send_header(name, value)
        if self.states_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cuts.pop(0) if self.cuts else len(body)])
        handler.wfile.flush()
        self.before_end()
        handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("MSN_EVAL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 1000))  # pauses between attempts
    file_server = FileServer()
    thread = threading.Thread(target=file_server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield file_server
    file_server.http.shutdown()
    thread.join()
    file_server.http.server_close()
