import errno
import hashlib
import http.server
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from msn_eval.checkpoints import hf_folder as hub_files
from msn_eval.checkpoints import hf_folder as hub_module
from msn_eval.checkpoints.hf_folder import HubFolder, image_statistics, open_hub, read_hub_config, weight_files
from msn_eval.errors import CheckpointError, StoreError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "f" * 40
CONFIG = json.dumps({"model_type": "vit_msn", "num_attention_heads": 6}).encode()
PREPROCESSOR = json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]}).encode()
FILES = {"config.json": CONFIG, "preprocessor_config.json": PREPROCESSOR, "model.safetensors": b"weights"}


def index(kind: str, *shards: str) -> bytes:
    return json.dumps({"weight_map": {f"layer.{number}": name for number, name in enumerate(shards)}}).encode()


class Hub:
    """A hub with one repository, `owner/name`, that remembers what was asked of it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = dict(FILES)
        self.revisions = {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT, LATER: LATER}
        self.refusal: tuple[int, str] | None = None
        self.garbage = False
        self.before_answer: Callable[[], object] = lambda: None
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                outer._answer(self)

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Http(http.server.ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:  # clients that hang up are meant
                pass

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def fetched(self) -> list[str]:
        return [line.rpartition("/")[2] for line in self.asked if line.startswith("GET") and "/resolve/" in line]

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.asked.append(f"{handler.command} {handler.path}")
        self.tokens.add(handler.headers["Authorization"])
        self.before_answer()
        if self.refusal is not None:
            return self._send(handler, self.refusal[0], b"{}", {"X-Error-Code": self.refusal[1]})
        if self.garbage:
            return self._send(handler, 200, b"<html>Sign in</html>", {})
        model = re.fullmatch(r"/api/models/owner/name/revision/(.+)", handler.path)
        if model is not None:
            commit = self.revisions.get(model[1].replace("%2F", "/"))
            if commit is None:
                return self._send(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in self.files]
            return self._send(
                handler, 200, json.dumps({"id": "owner/name", "sha": commit, "siblings": siblings}).encode(), {}
            )
        file = re.fullmatch(r"/owner/name/resolve/([^/]+)/(.+)", handler.path)
        commit = self.revisions.get(file[1]) if file is not None else None
        if file is None or commit is None:
            return self._send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        body = self.files.get(file[2])
        if body is None:
            return self._send(handler, 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self._send(
            handler, 200, body, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
        )

    def _send(
        self, handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of $HF_HOME's cache, and take every other word about the hub out of the environment."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "MSN_EVAL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "home" / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "own", FILES)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the hub's address at a port where nobody listens."""
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unheard.getsockname()[1]}")


def refused(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_hub(name)
    assert caught.value.exit_code == 20
    return str(caught.value)


# --- a repository, with a network


def test_repository_is_downloaded_at_the_commit_of_its_branch(hub: Hub, cache: Path) -> None:
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    assert open_hub("owner/name") == HubFolder(folder=snapshot, revision=COMMIT, repo="owner/name")
    assert {name: (snapshot / name).read_bytes() for name in FILES} == FILES


def test_tag_is_resolved_to_its_commit(hub: Hub, cache: Path) -> None:
    assert open_hub("owner/name@v1").revision == COMMIT


def test_branch_with_a_slash_is_a_revision(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.revisions["refs/pr/1"] = COMMIT
    assert open_hub("owner/name@refs/pr/1").revision == COMMIT


def test_only_what_is_needed_is_downloaded(hub: Hub, cache: Path) -> None:
    hub.files |= dict.fromkeys(("pytorch_model.bin", "modeling.py", "tf_model.h5", "README.md", "a/config.json"), b"x")
    open_hub("owner/name")
    assert hub.fetched() == ["config.json", "preprocessor_config.json", "model.safetensors"]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_of_an_index_are_downloaded(hub: Hub, cache: Path, suffix: str) -> None:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    del hub.files["model.safetensors"]
    hub.files |= {f"{stem}-1{suffix}": b"1", f"{stem}-2{suffix}": b"2"}
    hub.files[f"{stem}{suffix}.index.json"] = index(
        suffix, f"{stem}-2{suffix}", f"{stem}-1{suffix}", f"{stem}-2{suffix}"
    )
    found = weight_files(open_hub("owner/name").folder)
    assert [path.name for path in found] == [f"{stem}-1{suffix}", f"{stem}-2{suffix}"]


def test_repository_without_an_image_processor_has_no_statistics(hub: Hub, cache: Path) -> None:
    del hub.files["preprocessor_config.json"]
    assert image_statistics(open_hub("owner/name").folder) is None


def test_code_of_a_repository_is_refused_before_its_weights_are_fetched(hub: Hub, cache: Path) -> None:
    hub.files["config.json"] = json.dumps({"auto_map": {"AutoModel": "modeling.Model"}}).encode()
    assert "wants code of its own repository run (auto_map), which never happens here" in refused("owner/name")
    assert hub.fetched() == ["config.json", "preprocessor_config.json"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_repository_in_another_layout_is_refused(hub: Hub, cache: Path, missing: str) -> None:
    del hub.files[missing]
    assert "hf:owner/name@main: the repository has no config.json, or none of model.safetensors" in refused(
        "owner/name"
    )
    assert hub.fetched() == []


def test_shard_that_the_repository_lacks_is_named(hub: Hub, cache: Path) -> None:
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = index(".safetensors", "gone.safetensors")
    assert re.search(r"the hub refuses it \(HTTP 404, (Remote)?EntryNotFoundError\)", refused("owner/name"))


def test_shard_with_a_path_is_not_asked_for(hub: Hub, cache: Path) -> None:
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = index(".safetensors", "../../../x.safetensors")
    assert "names '../../../x.safetensors', no plain name" in refused("owner/name")
    assert "x.safetensors" not in " ".join(hub.asked)


@pytest.mark.parametrize(("status", "code"), [(401, "RepoNotFound"), (403, "GatedRepo"), (403, ""), (401, "")])
def test_repository_without_access_tells_of_the_token(hub: Hub, cache: Path, status: int, code: str) -> None:
    hub.refusal = status, code
    text = refused("owner/name")
    assert f"the hub gives no access (HTTP {status}): the repository is gated or private" in text
    assert "$HF_TOKEN" in text


def test_token_of_the_environment_is_sent(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    open_hub("owner/name")
    assert hub.tokens == {"Bearer hf_secret"}


def test_token_is_in_no_error(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refusal = 403, "GatedRepo"
    assert "hf_secret" not in refused("owner/name")


def test_unknown_repository_is_told(hub: Hub, cache: Path) -> None:
    hub.refusal = 404, "RepoNotFound"
    assert refused("owner/name").startswith("hf:owner/name@main: the hub has no repository of this name\n")


def test_unknown_revision_is_told(hub: Hub, cache: Path) -> None:
    assert refused("owner/name@v9").startswith("hf:owner/name@v9: the repository has no such branch, tag or commit\n")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "name",
        "/nowhere",
        "a/b/c",
        "owner/name@",
        "owner/../name",
        "~nobody/x",
        "a b/c",
        "owner/name@../x",
        "x" * 5000,
    ],
)
def test_name_that_is_neither_folder_nor_repository_is_refused(cache: Path, name: str) -> None:
    assert re.search("is neither a folder that exists nor OWNER/NAME|cannot be read: File name too long", refused(name))


def test_name_that_the_library_refuses_is_refused(hub: Hub, cache: Path) -> None:
    assert "is no name of a repository" in refused("owner/-name-")


def test_commit_that_is_complete_in_the_cache_asks_nobody(hub: Hub, cache: Path) -> None:
    open_hub("owner/name")
    hub.asked.clear()
    assert open_hub(f"owner/name@{COMMIT}").revision == COMMIT
    assert hub.asked == []


def test_branch_that_moved_is_followed(hub: Hub, cache: Path) -> None:
    open_hub("owner/name")
    hub.revisions["main"] = LATER
    hub.files["model.safetensors"] = b"later weights"
    found = open_hub("owner/name")
    assert (found.revision, (found.folder / "model.safetensors").read_bytes()) == (LATER, b"later weights")


def test_weights_alone_in_the_cache_are_completed(hub: Hub, cache: Path) -> None:
    folder = open_hub("owner/name").folder
    (folder / "preprocessor_config.json").unlink()
    open_hub(f"owner/name@{COMMIT}")
    assert image_statistics(folder) is not None


def test_cache_that_cannot_be_written_is_a_store_error(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*arguments: object, **others: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(StoreError, match=rf"{cache}: cannot be written: No space left") as caught:
        open_hub("owner/name")
    assert caught.value.exit_code == 22


def test_cache_under_a_file_is_a_store_error(hub: Hub, cache: Path) -> None:
    cache.parent.write_text("no folder")
    with pytest.raises(StoreError, match="cannot be written"):
        open_hub("owner/name")


# --- a repository, without a network


def test_branch_is_found_in_the_cache_when_the_hub_is_down(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    online = open_hub("owner/name")
    unplug(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert open_hub("owner/name") == online
    assert "the hub cannot be reached" in caplog.text


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "MSN_EVAL_OFFLINE"])
def test_forbidden_hub_is_not_asked(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    online = open_hub("owner/name@v1")
    hub.asked.clear()
    monkeypatch.setenv(variable, "1")
    assert open_hub("owner/name@v1") == online
    assert hub.asked == []


def test_commit_is_found_in_the_cache_by_itself(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_hub(f"owner/name@{COMMIT}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_hub(f"owner/name@{COMMIT}").revision == COMMIT


def test_absence_of_an_image_processor_is_remembered(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub.files["preprocessor_config.json"]
    online = open_hub("owner/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_hub("owner/name") == online


def test_hub_that_stays_silent_falls_back_to_the_cache(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_hub("owner/name")
    silence = threading.Event()
    hub.before_answer = lambda: silence.wait(30)
    monkeypatch.setattr(hub_module, "_ANSWER_SECONDS", 0.1)
    start = time.monotonic()
    try:
        assert open_hub("owner/name") == online
        assert time.monotonic() - start < 5
    finally:
        silence.set()


def test_server_error_falls_back_to_the_cache(hub: Hub, cache: Path) -> None:
    online = open_hub("owner/name")
    hub.refusal = 503, ""
    assert open_hub("owner/name") == online


def test_page_in_place_of_an_answer_falls_back_to_the_cache(hub: Hub, cache: Path) -> None:
    online = open_hub("owner/name")
    hub.garbage = True
    assert open_hub("owner/name") == online


def test_nothing_in_the_cache_tells_what_to_run_elsewhere(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert refused("owner/name@v1") == (
        f"hf:owner/name@v1: the cache {cache} lacks this revision, and $HF_HUB_OFFLINE forbids to download it\n"
        "Where there is a network, run `hf download owner/name --revision v1` (formerly huggingface-cli) and copy the "
        "folder models--owner--name of its cache into this one ($HF_HUB_CACHE names another)."
    )


def test_no_network_is_told_within_seconds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(monkeypatch)
    start = time.monotonic()
    assert "lacks this revision, and the hub cannot be reached: Connect" in refused("owner/name")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_part_of_a_repository_in_the_cache_is_told(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (open_hub("owner/name").folder / name).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"lacks {'config.json' if name == 'config.json' else 'weights'}" in refused("owner/name")


def test_mean_and_std_are_not_guessed_from_a_cache_without_them(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_hub("owner/name").folder
    (folder / "preprocessor_config.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = refused("owner/name")
    assert "lacks preprocessor_config.json, which would state mean and std, or a note that there is none" in text
    assert text.endswith(f"hf:{folder}")


def test_config_of_timm_states_mean_and_std_itself(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"config.json": b'{"architecture": "vit", "pretrained_cfg": {}}', "model.safetensors": b"weights"}
    folder = open_hub("owner/name")
    (cache / "models--owner--name" / ".no_exist" / COMMIT / "preprocessor_config.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_hub("owner/name") == folder


def test_reference_that_is_no_commit_is_not_followed(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_hub("owner/name")
    (cache / "models--owner--name" / "refs" / "main").write_text("../../../elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "lacks this revision" in refused("owner/name")


def test_cache_of_the_environment_comes_first(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    assert open_hub("owner/name").folder.is_relative_to(tmp_path / "other")


def test_cache_that_the_library_itself_filled_is_read(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        ""
        "from huggingface_hub import hf_hub_download\n"
        "for name in ('config.json', 'preprocessor_config.json', 'model.safetensors'): hf_hub_download('owner/name', name)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_hub("owner/name").revision == COMMIT


def test_variables_of_the_start_are_obeyed_too(hub: Hub, cache: Path) -> None:
    program = "from msn_eval.checkpoints.hf_folder import open_hub; print(open_hub('owner/name').revision)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    open_hub("owner/name")
    hub.asked.clear()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), hub.asked) == (COMMIT, [])


# --- a folder


def test_folder_is_taken_as_it_is(folder: Path) -> None:
    assert open_hub(str(folder)) == HubFolder(folder=folder, revision=None, repo=None)


def test_folder_comes_before_a_repository_of_the_same_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "owner" / "name", FILES)
    monkeypatch.chdir(tmp_path)
    assert (open_hub("owner/name").repo, hub.asked) == (None, [])


@pytest.mark.parametrize("place", range(4))
def test_weights_are_taken_in_the_order_of_preference(tmp_path: Path, place: int) -> None:
    files = {
        "model.safetensors": b"1",
        "model.safetensors.index.json": index(".safetensors", "a.safetensors"),
        "pytorch_model.bin": b"3",
        "pytorch_model.bin.index.json": index(".bin", "a.bin"),
        "a.safetensors": b"2",
        "a.bin": b"4",
    }
    present = dict(list(files.items())[place:])
    assert [path.read_bytes() for path in weight_files(write(tmp_path / "f", present))] == [str(place + 1).encode()]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    names = [f"{number}.safetensors" for number in range(3)]
    files = {"model.safetensors.index.json": index(".safetensors", *names), names[1]: b""}
    with pytest.raises(CheckpointError, match=r"lacks 2 of the 3 files .* names: 0\.safetensors, 2\.safetensors"):
        weight_files(write(tmp_path / "f", files))


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "..", "", "b\\a.safetensors", "a.bin", "a.py", 7]
)
def test_shard_that_is_no_plain_file_of_its_kind_is_refused(tmp_path: Path, name: object) -> None:
    content = json.dumps({"weight_map": {"x": name}}).encode()
    write(tmp_path / "f", {"a.bin": b"", "a.py": b"", "model.safetensors.index.json": content})
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors\.index\.json: names .*, no plain name of a \.safeten"
    ):
        weight_files(tmp_path / "f")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "the name 'x' is there twice"),
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[]", "holds no JSON object"),
        (b"{}", "has no weight_map"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": ["a"]}', "has no weight_map"),
    ],
)
def test_index_that_cannot_be_trusted_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    write(tmp_path / "f", {"model.safetensors.index.json": content, "a.safetensors": b"", "b.safetensors": b""})
    with pytest.raises(CheckpointError, match=what):
        weight_files(tmp_path / "f")


def test_folder_without_weights_says_which_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors, .*pytorch_model\.bin"):
        weight_files(write(tmp_path / "f", {"config.json": CONFIG}))


def test_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"is a link that leads out of its folder, to .*secret"):
        weight_files(folder)


def test_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "real")
    (folder / "model.safetensors").symlink_to("real")
    assert weight_files(folder) == (folder / "model.safetensors",)


def test_link_of_the_cache_is_followed_from_wherever_the_folder_is_named(hub: Hub, cache: Path, tmp_path: Path) -> None:
    snapshot = open_hub("owner/name").folder
    assert (snapshot / "model.safetensors").is_symlink()
    (tmp_path / "short").symlink_to(snapshot)
    assert open_hub(str(tmp_path / "short")).folder == tmp_path / "short"


def test_link_that_leads_nowhere_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match="is no readable file"):
        weight_files(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_that_cannot_be_read_is_refused(folder: Path) -> None:
    folder.chmod(0)
    try:
        assert "cannot be read" in refused(str(folder))
    finally:
        folder.chmod(0o700)


def test_config_is_given_as_plain_data(folder: Path) -> None:
    assert read_hub_config(folder) == {"model_type": "vit_msn", "num_attention_heads": 6}


def test_folder_without_a_config_says_what_to_do(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refused(str(folder)) == (
        f"{folder}: holds no config.json\n"
        "Copy it from where the weights came from, or give the path of the weight file itself."
    )


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_code_of_a_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text('{"auto_map": {}}')
    assert f"{folder / name}: wants code of its own" in refused(str(folder))


def test_overlong_config_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_files, "_MAX_JSON_BYTES", len(CONFIG) - 1)
    with pytest.raises(CheckpointError, match="is damaged: more than"):
        read_hub_config(folder)


def test_repeated_name_in_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": {"heads": 1, "heads": 2}}')
    with pytest.raises(CheckpointError, match="the name 'heads' is there twice"):
        read_hub_config(folder)


def test_statistics_are_those_of_the_image_processor(folder: Path) -> None:
    assert image_statistics(folder) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.1))


def test_folder_without_an_image_processor_has_no_statistics(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert image_statistics(folder) is None


def test_image_processor_that_states_neither_gives_none(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"size": 224, "image_mean": null}')
    assert image_statistics(folder) is None


def test_images_that_are_not_normalised_have_zeros_and_ones(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false, "image_mean": [9, 9, 9]}')
    assert image_statistics(folder) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "mean",
    ["[1, 2]", "[1, 2, 3, 4]", "[1, 2, NaN]", "[1, 2, Infinity]", '[1, 2, "3"]', "[1, 2, true]", "0.5", "null", "{}"],
)
def test_mean_that_is_not_three_numbers_is_refused(folder: Path, mean: str) -> None:
    (folder / "preprocessor_config.json").write_text(f'{{"image_mean": {mean}, "image_std": [1, 1, 1]}}')
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: image_mean is not three finite numbers"):
        image_statistics(folder)


@pytest.mark.parametrize("std", ["[1, 0, 1]", "[1, 1, -1]"])
def test_std_that_is_not_positive_is_refused(folder: Path, std: str) -> None:
    (folder / "preprocessor_config.json").write_text(f'{{"image_mean": [1, 1, 1], "image_std": {std}}}')
    with pytest.raises(CheckpointError, match="is not positive"):
        image_statistics(folder)


def test_number_too_long_for_a_float_is_refused(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(f'{{"image_mean": [1, 1, {"9" * 400}], "image_std": [1, 1, 1]}}')
    with pytest.raises(CheckpointError):
        image_statistics(folder)


def test_importing_the_room_loads_neither_torch_nor_the_library() -> None:
    program = (
        "import sys, msn_eval.checkpoints.hf_folder; print({'torch', 'huggingface_hub', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
