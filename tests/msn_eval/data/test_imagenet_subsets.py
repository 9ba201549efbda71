import hashlib
import http.server
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval.data import imagenet_subsets as published_lists
from msn_eval.data.imagenet_subsets import (
    Publication,
    PublishedList,
    fetch_lists,
    find_list,
    list_folders,
    read_publication,
    read_published_list,
)
from msn_eval.errors import DataError


@pytest.fixture
def named_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of $MSN_EVAL_LISTS, and let no other folder of this user or repository play a part."""
    read_publication()  # from the shipped folder, before that is hidden
    folder = tmp_path / "lists"
    folder.mkdir()
    monkeypatch.setenv("MSN_EVAL_LISTS", str(folder))
    monkeypatch.setattr(published_lists, "find_package_folder", lambda name: tmp_path / "shipped" / name)
    monkeypatch.setattr(published_lists, "find_user_list_folder", lambda: tmp_path / "user")
    monkeypatch.chdir(tmp_path)
    return folder


def entry_of(subset: str, draw: int) -> PublishedList:
    return next(entry for entry in read_publication().lists_of(subset) if entry.draw == draw)


def test_committed_hashes_are_those_of_the_repository(shared_data: Path) -> None:
    sums = (shared_data / "imagenet_subsets" / "SHA256SUMS").read_text().splitlines()
    wanted = {path.lstrip("*./"): digest for digest, path in (line.split(maxsplit=1) for line in sums)}
    assert {entry.path: entry.sha256 for entry in read_publication().lists} == wanted


def test_committed_sizes_are_those_of_the_lists(shared_data: Path) -> None:
    folder = shared_data / "imagenet_subsets"
    actual = [(len(content), content.count(b"\n")) for content in _contents(folder)]
    assert [(entry.bytes, entry.images) for entry in read_publication().lists] == actual


def test_committed_counts_are_true_of_each_class(shared_data: Path) -> None:
    shots = {"1img": {1}, "2imgs": {2}, "5imgs": {5}, "1pct": {12, 13}}
    contents = _contents(shared_data / "imagenet_subsets")
    for entry, content in zip(read_publication().lists, contents, strict=True):
        counts = Counter(line.partition("_")[0] for line in content.decode().split())
        assert (len(counts), set(counts.values())) == (1000, shots[entry.subset])


def test_committed_class_map_is_that_of_the_lists(shared_data: Path) -> None:
    content = _contents(shared_data / "imagenet_subsets")[0].decode()
    classes = sorted({line.partition("_")[0] for line in content.split()})
    digest = hashlib.sha256("".join(f"{name}\n" for name in classes).encode()).hexdigest()
    assert read_publication().class_map_sha256 == digest


def _contents(folder: Path) -> list[bytes]:
    return [(folder / entry.path).read_bytes() for entry in read_publication().lists]


def test_lists_are_found_by_content_under_any_name(shared_data: Path, named_folder: Path) -> None:
    for number, entry in enumerate(read_publication().lists):
        (named_folder / "deep").mkdir(exist_ok=True)
        shutil.copy(shared_data / "imagenet_subsets" / entry.path, named_folder / "deep" / f"{number}.txt")
    actual = [find_list(entry) for entry in read_publication().lists]
    assert actual == [named_folder / "deep" / f"{number}.txt" for number in range(10)]


def test_altered_list_is_not_accepted(shared_data: Path, named_folder: Path) -> None:
    entry = entry_of("1img", 1)
    content = bytearray((shared_data / "imagenet_subsets" / entry.path).read_bytes())
    content[-7] ^= 1
    (named_folder / "1imgs_class.txt").write_bytes(content)
    assert find_list(entry) is None


def test_missing_list_is_named_with_the_folders_and_the_hint(named_folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_published_list(entry_of("2imgs", 3))
    text = str(caught.value)
    assert caught.value.exit_code == 21
    assert "2imgs@3 (imagenet_subsets3/2imgs_class.txt)" in text
    assert str(named_folder) in text
    assert "msn-eval subsets fetch" in text
    assert "$MSN_EVAL_LISTS" in text


@pytest.mark.usefixtures("named_folder")
def test_folders_are_searched_without_a_named_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MSN_EVAL_LISTS")
    assert list_folders() == (
        tmp_path / "shipped" / "imagenet_subsets",
        Path("imagenet_subsets"),
        tmp_path / "user",
    )


CONTENTS = {"one.txt": b"n01440764_1.JPEG\n", "deep/two.txt": b"n01440764_1.JPEG\nn01440764_2.JPEG\n"}


@pytest.fixture
def publication(monkeypatch: pytest.MonkeyPatch) -> Publication:
    """Publish two lists of a few bytes."""
    lists = tuple(
        PublishedList(
            subset="1img",
            draw=draw,
            path=path,
            images=draw,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        for draw, (path, content) in enumerate(CONTENTS.items(), start=1)
    )
    small = replace(read_publication(), lists=lists)
    monkeypatch.setattr(published_lists, "read_publication", lambda: small)
    return small


class Server:
    """A web server of files in memory that records the requests."""

    def __init__(self) -> None:
        self.files = {f"/lists/{path}": content for path, content in CONTENTS.items()}
        self.promised_bytes = 0  # more than it sends
        self.requested: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requested.append(self.path)
                content = outer.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(max(outer.promised_bytes, len(content))))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.http = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/lists"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.mark.usefixtures("publication")
def test_lists_are_fetched_to_their_paths(server: Server, tmp_path: Path) -> None:
    what = [(entry.path, state) for entry, state in fetch_lists(tmp_path / "to", server.url)]
    assert what == [("one.txt", "fetched"), ("deep/two.txt", "fetched")]
    assert {path: (tmp_path / "to" / path).read_bytes() for path in CONTENTS} == CONTENTS


@pytest.mark.usefixtures("publication")
def test_lists_that_are_there_are_kept_without_asking(server: Server, tmp_path: Path) -> None:
    list(fetch_lists(tmp_path, server.url))
    server.requested.clear()
    assert [state for _, state in fetch_lists(tmp_path, server.url)] == ["kept", "kept"]
    assert server.requested == []


@pytest.mark.usefixtures("publication")
def test_other_bytes_than_published_are_refused_and_not_written(server: Server, tmp_path: Path) -> None:
    server.files["/lists/deep/two.txt"] = b"<html>Sign in</html>"
    with pytest.raises(DataError, match=r"/lists/deep/two\.txt: 20 bytes with SHA-256 .* instead of") as caught:
        list(fetch_lists(tmp_path, server.url))
    assert caught.value.exit_code == 21
    assert [path.name for path in tmp_path.rglob("*")] == ["one.txt"]


@pytest.mark.usefixtures("publication")
def test_missing_page_names_its_address(server: Server, tmp_path: Path) -> None:
    del server.files["/lists/one.txt"]
    with pytest.raises(DataError, match=r"/lists/one\.txt: could not be downloaded: Not Found"):
        list(fetch_lists(tmp_path, server.url))


@pytest.mark.usefixtures("publication")
def test_download_that_is_cut_off_is_a_data_error(server: Server, tmp_path: Path) -> None:
    server.promised_bytes = 1000
    with pytest.raises(DataError, match=r"/lists/one\.txt: could not be downloaded"):
        list(fetch_lists(tmp_path, server.url))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("publication")
def test_server_that_is_down_leads_to_the_place_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unheard:  # bound and not listening: nobody else gets this port, and nobody answers
        unheard.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"could not be downloaded: .*refused") as caught:
            list(fetch_lists(tmp_path, f"http://127.0.0.1:{unheard.getsockname()[1]}"))
    assert f"put it at {tmp_path / 'one.txt'}" in caught.value.hint
