import hashlib
import http.server
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval.checkpoints.msn_release import MSN_RELEASES, fetch_msn, find_release, sidecar_of, weights_folder
from msn_eval.errors import CheckpointError

CONTENT = b"PK\x03\x04 weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """A mirror that has every file of the release, or none, and remembers what was asked for."""

    def __init__(self) -> None:
        self.content: bytes | None = CONTENT
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if outer.content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.content)))
                self.end_headers()
                self.wfile.write(outer.content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/msn"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("MSN_EVAL_WEIGHTS_URL", f"{made.url}/")
    for name in ("MSN_EVAL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def test_five_networks_were_released() -> None:
    assert {name: release.file for name, release in MSN_RELEASES.items()} == {
        "vits16": "vits16_800ep.pth.tar",
        "vitb16": "vitb16_600ep.pth.tar",
        "vitl16": "vitl16_600ep.pth.tar",
        "vitb4": "vitb4_300ep.pth.tar",
        "vitl7": "vitl7_200ep.pth.tar",
    }


def test_no_hash_is_claimed_that_nobody_published() -> None:
    assert {release.sha256 for release in MSN_RELEASES.values()} == {None}


def test_unknown_name_is_told_the_nearest_and_all_five() -> None:
    with pytest.raises(CheckpointError) as caught:
        find_release("vit16s")
    assert caught.value.exit_code == 20
    assert str(caught.value) == (
        "msn:vit16s: MSN released no network 'vit16s'. Did you mean vits16?\n"
        "There are msn:vits16, msn:vitb16, msn:vitl16, msn:vitb4, msn:vitl7."
    )


def test_first_fetch_downloads_the_file(server: Server, folder: Path) -> None:
    assert fetch_msn("vitb4") == folder / "vitb4_300ep.pth.tar"
    assert (folder / "vitb4_300ep.pth.tar").read_bytes() == CONTENT
    assert server.asked == ["/msn/vitb4_300ep.pth.tar"]


def test_second_fetch_asks_nobody(server: Server, folder: Path) -> None:
    fetch_msn("vits16")
    server.asked.clear()
    assert fetch_msn("vits16") == folder / "vits16_800ep.pth.tar"
    assert server.asked == []


def test_part_that_a_killed_process_left_beside_the_file_is_swept_out(server: Server, folder: Path) -> None:
    path = fetch_msn("vits16")
    left = path.with_name(f".{path.name}.{'0' * 16}.{'0' * 8}.part")
    left.touch()
    fetch_msn("vits16")
    assert not left.exists()


def test_file_that_is_there_needs_no_network(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    folder.mkdir()
    (folder / "vitl7_200ep.pth.tar").write_bytes(b"put here by hand")
    assert fetch_msn("vitl7").read_bytes() == b"put here by hand"


def test_fetch_keeps_the_hash_as_sha256sum_reads_it(server: Server, folder: Path) -> None:
    path = fetch_msn("vits16")
    done = subprocess.run(["sha256sum", "-c", f"{path.name}.sha256"], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "vits16_800ep.pth.tar: OK\n"


def test_hash_of_an_earlier_file_gives_way_to_that_of_the_new(server: Server, folder: Path) -> None:
    path = fetch_msn("vits16")
    path.unlink()
    server.content = CONTENT + b"other"
    fetch_msn("vits16")
    assert sidecar_of(path).read_text().split()[0] == hashlib.sha256(CONTENT + b"other").hexdigest()


def test_known_hash_is_held_against_the_download(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = replace(MSN_RELEASES["vits16"], sha256="0" * 64)
    monkeypatch.setitem(MSN_RELEASES, "vits16", known)
    with pytest.raises(CheckpointError, match=f"SHA-256 {SHA256} instead of 0000"):
        fetch_msn("vits16")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("variable", ["MSN_EVAL_OFFLINE", "HF_HUB_OFFLINE"])
def test_forbidden_network_is_not_asked(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(CheckpointError) as caught:
        fetch_msn("vitb16")
    path = folder / "vitb16_600ep.pth.tar"
    assert str(caught.value) == (
        f"msn:vitb16: {path} is not there, and ${variable} forbids to download it\n"
        f"Download {server.url}/vitb16_600ep.pth.tar by hand, where there is a network, and put it at {path}; "
        "$MSN_EVAL_WEIGHTS names another folder."
    )
    assert (server.asked, folder.exists()) == ([], False)


def test_variable_that_says_no_forbids_nothing(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "0")
    assert fetch_msn("vitb16").is_file()


def test_failed_download_tells_address_and_path(server: Server, folder: Path) -> None:
    server.content = None
    with pytest.raises(CheckpointError) as caught:
        fetch_msn("vitl16")
    assert str(caught.value).startswith(f"{server.url}/vitl16_600ep.pth.tar: could not be downloaded: HTTP 404")
    assert f"put it at {folder / 'vitl16_600ep.pth.tar'}" in caught.value.hint


def test_address_of_the_authors_stands_where_no_mirror_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSN_EVAL_WEIGHTS_URL", raising=False)
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"https://dl\.fbaipublicfiles\.com/msn/vits16_800ep\.pth\.tar by hand"):
        fetch_msn("vits16")


def test_folder_is_in_the_cache_where_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MSN_EVAL_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_folder() == tmp_path / "msn-eval" / "weights"
