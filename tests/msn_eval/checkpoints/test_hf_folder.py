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
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

from msn_eval.checkpoints import hf_folder as module
from msn_eval.checkpoints.hf_folder import find_weight_files, open_hub, read_image_processor
from msn_eval.errors import CheckpointError, StoreError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "f" * 40
CONFIG = json.dumps({"model_type": "vit_msn", "num_attention_heads": 6}).encode()
PREPROCESSOR = json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]}).encode()
FILES = {"config.json": CONFIG, "preprocessor_config.json": PREPROCESSOR, "model.safetensors": b"weights"}


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"layer.{number}": name for number, name in enumerate(shards)}}).encode()


class Hub:
    """A hub with one repository, `owner/name`, that records its requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = dict(FILES)
        self.revisions = {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT, LATER: LATER}
        self.refusal: tuple[int, str] | None = None
        self.garbage = False
        self.before_answer: Callable[[], object] = lambda: None
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                outer._record(self)
                status, body, headers = outer._answer(unquote(self.path))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_GET = do_HEAD = answer  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Http(http.server.ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:  # clients may hang up
                pass

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def downloaded(self) -> list[str]:
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]

    def _record(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.requests.append(f"{handler.command} {handler.path}")
        self.tokens.add(handler.headers["Authorization"])
        self.before_answer()

    def _answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        if self.refusal is not None:
            return self.refusal[0], b"{}", {"X-Error-Code": self.refusal[1]}
        if self.garbage:
            return 200, b"<html>Sign in</html>", {}
        if model := re.fullmatch("/api/models/owner/name/revision/(.+)", path):
            commit = self.revisions.get(model[1])
            if commit is None:
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
            siblings = [{"rfilename": name} for name in self.files]
            return 200, json.dumps({"id": "owner/name", "sha": commit, "siblings": siblings}).encode(), {}
        file = re.fullmatch(f"/owner/name/resolve/({'|'.join(self.revisions)})/(.+)", path)
        if file is None:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        commit, body = self.revisions[file[1]], self.files.get(file[2])
        if body is None:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        return 200, body, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; the environment says nothing about the hub."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "MSN_EVAL")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # of other processes
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home" / "hub"


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    set_endpoint(monkeypatch, hub.url)
    thread = threading.Thread(target=hub.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.http.shutdown()
    thread.join()
    hub.http.server_close()


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
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        set_endpoint(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")


def refusal(name: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_hub(name)
    assert caught.value.exit_code == 20
    return str(caught.value)


# A repository, with a network


def test_repository_is_downloaded_at_the_commit_of_its_branch(hub: Hub, cache: Path) -> None:
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    assert open_hub("owner/name") == (snapshot, f"hf:owner/name@{COMMIT}")
    assert {name: (snapshot / name).read_bytes() for name in FILES} == FILES


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1"])
def test_tag_or_branch_is_resolved_to_its_commit(hub: Hub, revision: str) -> None:
    hub.revisions["refs/pr/1"] = COMMIT
    assert open_hub(f"owner/name@{revision}")[1] == f"hf:owner/name@{COMMIT}"


def test_only_needed_files_are_downloaded(hub: Hub) -> None:
    hub.files |= dict.fromkeys(("pytorch_model.bin", "modeling.py", "tf_model.h5", "README.md", "a/config.json"), b"x")
    open_hub("owner/name")
    assert hub.downloaded() == ["config.json", "preprocessor_config.json", "model.safetensors"]


@pytest.mark.parametrize(("stem", "suffix"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_shards_of_an_index_are_downloaded(hub: Hub, stem: str, suffix: str) -> None:
    del hub.files["model.safetensors"]
    shards = [f"{stem}-{number}{suffix}" for number in (1, 2)]
    hub.files |= dict.fromkeys(shards, b"x") | {f"{stem}{suffix}.index.json": index(*shards[::-1], shards[1])}
    assert [path.name for path in find_weight_files(open_hub("owner/name")[0])] == shards


def test_code_of_a_repository_is_refused_before_its_weights_are_downloaded(hub: Hub) -> None:
    hub.files["config.json"] = json.dumps({"auto_map": {"AutoModel": "modeling.Model"}}).encode()
    assert "Requires code of its own repository (auto_map), which is never run here" in refusal("owner/name")
    assert hub.downloaded() == ["config.json", "preprocessor_config.json"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_repository_in_another_layout_is_refused(hub: Hub, missing: str) -> None:
    del hub.files[missing]
    text = "hf:owner/name@main: The repository has no config.json, or none of model.safetensors"
    assert text in refusal("owner/name")
    assert hub.downloaded() == []


def test_shard_with_a_path_is_not_requested(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = index("../../../x.safetensors")
    assert "'../../../x.safetensors' is not the name of a .safetensors file" in refusal("owner/name")
    assert "x.safetensors" not in " ".join(hub.requests)


@pytest.mark.parametrize(
    ("status", "code"), [(401, "RepoNotFound"), (403, "GatedRepo"), (403, ""), (401, ""), (404, "RepoNotFound")]
)
def test_refused_access_names_status_and_token(hub: Hub, status: int, code: str) -> None:
    hub.refusal = status, code
    text = refusal("owner/name")
    assert text.startswith(f"hf:owner/name@main: The hub refuses access (HTTP {status})")
    assert "$HF_TOKEN" in text


def test_token_of_the_environment_is_sent_and_in_no_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refusal = 403, "GatedRepo"
    assert "hf_secret" not in refusal("owner/name")
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize("name", ["owner/name@v9", "owner/-name-", "owner/shards"])
def test_name_revision_or_file_that_the_hub_lacks_is_refused(hub: Hub, name: str) -> None:
    if name == "owner/shards":
        del hub.files["model.safetensors"]
        hub.files["model.safetensors.index.json"] = index("gone.safetensors")
        name = "owner/name"
    assert f"hf:{name}{'' if '@' in name else '@main'}: Not on the hub: " in refusal(name)


@pytest.mark.parametrize(
    "name",
    ["", "name", "/nowhere", "a/b/c", "owner/name@", "owner/../name", "~nobody/x", "a b/c", "o/n@../x", "x" * 5000],
    ids=lambda name: name[:20],
)
def test_name_that_is_neither_folder_nor_repository_is_refused(cache: Path, name: str) -> None:
    assert "Neither an existing folder nor OWNER/NAME" in refusal(name)


def test_commit_that_is_complete_in_the_cache_needs_no_request(hub: Hub) -> None:
    open_hub("owner/name")
    hub.requests.clear()
    assert open_hub(f"owner/name@{COMMIT}")[0].name == COMMIT
    assert hub.requests == []


def test_branch_that_moved_is_followed(hub: Hub) -> None:
    open_hub("owner/name")
    hub.revisions["main"] = LATER
    hub.files["model.safetensors"] = b"later weights"
    folder, name = open_hub("owner/name")
    assert (name, (folder / "model.safetensors").read_bytes()) == (f"hf:owner/name@{LATER}", b"later weights")


def test_cache_with_weights_alone_is_completed(hub: Hub) -> None:
    folder = open_hub("owner/name")[0]
    (folder / "preprocessor_config.json").unlink()
    open_hub(f"owner/name@{COMMIT}")
    assert read_image_processor(folder)[1]


def test_full_disk_is_a_store_error(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(StoreError, match=rf"{cache}: Cannot write the cache: No space left"):
        open_hub("owner/name")


# A repository, without a network


@pytest.mark.parametrize("answer", [None, {"refusal": (503, "")}, {"garbage": True}], ids=["none", "error", "page"])
def test_useless_hub_falls_back_to_the_cache_with_a_warning(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: dict[str, object] | None
) -> None:
    online = open_hub("owner/name")
    unplug(monkeypatch) if answer is None else vars(hub).update(answer)
    with caplog.at_level(logging.WARNING):
        assert open_hub("owner/name") == online
    assert "the hub cannot be reached" in caplog.text


def test_silent_hub_falls_back_to_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_hub("owner/name")
    silence = threading.Event()
    hub.before_answer = lambda: silence.wait(30)
    monkeypatch.setattr(module, "_TIMEOUT_SECONDS", 0.1)
    start = time.monotonic()
    try:
        assert open_hub("owner/name") == online
        assert time.monotonic() - start < 5
    finally:
        silence.set()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "MSN_EVAL_OFFLINE"])
@pytest.mark.parametrize("revision", ["v1", COMMIT])
@pytest.mark.parametrize("has_processor", [True, False])
def test_forbidden_network_is_not_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str, revision: str, has_processor: bool
) -> None:
    if not has_processor:
        del hub.files["preprocessor_config.json"]
    online = open_hub(f"owner/name@{revision}")
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    assert open_hub(f"owner/name@{revision}") == online
    assert hub.requests == []


def test_empty_cache_error_names_the_command_to_run_elsewhere(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert refusal("owner/name@v1") == (
        f"hf:owner/name@v1: The cache {cache} lacks config.json, and $HF_HUB_OFFLINE forbids to download it\n"
        "On a machine with a network, run `hf download owner/name --revision v1` and copy the folder models--owner--name "
        "of its cache into this one ($HF_HUB_CACHE names another)."
    )


def test_no_network_is_an_error_within_seconds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(monkeypatch)
    start = time.monotonic()
    assert "lacks config.json, and the hub cannot be reached: Connect" in refusal("owner/name")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "weights"),
        ("preprocessor_config.json", "preprocessor_config.json (which may state mean and std)"),
    ],
)
def test_incomplete_cache_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, missing: str) -> None:
    """A guessed mean and std would change the score."""
    folder = open_hub("owner/name")[0]
    (folder / name).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = refusal("owner/name")
    assert f"lacks {missing}" in text
    assert text.endswith(f"hf:{folder}") == (name == "preprocessor_config.json")


def test_processor_that_the_cache_may_lack_is_missed(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub.files["preprocessor_config.json"]
    open_hub("owner/name")
    (cache / "models--owner--name" / ".no_exist" / COMMIT / "processor_config.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "lacks processor_config.json (which may state mean and std)" in refusal("owner/name")


def test_config_of_timm_needs_no_image_processor(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"config.json": b'{"architecture": "vit", "pretrained_cfg": {}}', "model.safetensors": b"weights"}
    folder = open_hub("owner/name")
    (cache / "models--owner--name" / ".no_exist" / COMMIT / "preprocessor_config.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_hub("owner/name") == folder


# A folder


def test_local_folder_is_used_as_it_is(folder: Path) -> None:
    assert open_hub(str(folder)) == (folder, f"hf:{folder}")


def test_local_folder_takes_precedence_over_a_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "owner" / "name", FILES)
    monkeypatch.chdir(tmp_path)
    assert (open_hub("owner/name"), hub.requests) == ((Path("owner/name"), "hf:owner/name"), [])


@pytest.mark.parametrize("first", range(4))
def test_weights_are_chosen_in_the_order_of_preference(tmp_path: Path, first: int) -> None:
    files = {
        "model.safetensors": b"1",
        "model.safetensors.index.json": index("a.safetensors"),
        "pytorch_model.bin": b"3",
        "pytorch_model.bin.index.json": index("a.bin"),
        "a.safetensors": b"2",
        "a.bin": b"4",
    }
    present = dict(list(files.items())[first:])
    assert [path.read_bytes() for path in find_weight_files(write(tmp_path / "f", present))] == [
        str(first + 1).encode()
    ]


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "..", "", "b\\a.safetensors", "a.bin", "a.py", 7]
)
def test_shard_that_is_not_a_plain_file_of_its_format_is_refused(tmp_path: Path, name: object) -> None:
    content = json.dumps({"weight_map": {"x": name}}).encode()
    write(tmp_path / "f", {"a.bin": b"", "a.py": b"", "model.safetensors.index.json": content})
    with pytest.raises(CheckpointError, match=r"index\.json: .* is not the name of a \.safetensors file"):
        find_weight_files(tmp_path / "f")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "Cannot be read as JSON"),
        (b"\xff", "Cannot be read as JSON"),
        (b"[" * 100_000, "Cannot be read as JSON"),
        (b"[]", "Not a JSON object"),
        (b"{}", "No weight_map"),
        (b'{"weight_map": {}}', "No weight_map"),
        (b'{"weight_map": ["a"]}', "No weight_map"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_damaged_index_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    write(tmp_path / "f", {"model.safetensors.index.json": content})
    with pytest.raises(CheckpointError, match=what):
        find_weight_files(tmp_path / "f")


@pytest.mark.parametrize(
    ("link", "what"),
    [("../secret", r"A link that leads out of its folder, to .*secret"), ("gone", "No such file, or not readable")],
)
def test_link_out_of_the_folder_or_to_nothing_is_refused(folder: Path, link: str, what: str) -> None:
    (folder.parent / "secret").write_bytes(b"")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(link)
    with pytest.raises(CheckpointError, match=what):
        find_weight_files(folder)


def test_link_of_the_cache_is_followed_through_a_link_to_the_folder(hub: Hub, tmp_path: Path) -> None:
    snapshot = open_hub("owner/name")[0]
    assert (snapshot / "model.safetensors").is_symlink()
    (tmp_path / "short").symlink_to(snapshot)
    assert open_hub(str(tmp_path / "short"))[0] == tmp_path / "short"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "config.json: No such file"),
        ("model.safetensors", ": The folder holds none of model.safetensors, "),
        ("2.safetensors", "2.safetensors: No such file"),
    ],
)
def test_missing_file_of_a_folder_is_named(folder: Path, name: str, text: str) -> None:
    if name == "2.safetensors":
        write(folder, {"model.safetensors.index.json": index("1.safetensors", name), "1.safetensors": b"", name: b""})
        (folder / "model.safetensors").unlink()
    (folder / name).unlink()
    assert text in refusal(str(folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_that_cannot_be_read_is_refused(folder: Path) -> None:
    folder.chmod(0)
    try:
        assert "readable" in refusal(str(folder))
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_code_of_a_folder_is_refused_at_any_depth(folder: Path, name: str) -> None:
    (folder / name).write_text('{"image_processor": {"a": [{"auto_map": {"AutoModel": "own.Model"}}]}}')
    assert f"{folder / name}: Requires code of its own" in refusal(str(folder))


def test_image_processor_of_a_processor_is_preferred_as_transformers_does(folder: Path) -> None:
    (folder / "processor_config.json").write_text('{"image_processor": {"do_rescale": false}}')
    assert read_image_processor(folder) == (folder / "processor_config.json", {"do_rescale": False})


def test_processor_without_an_image_processor_leaves_the_other_file_in_force(folder: Path) -> None:
    (folder / "processor_config.json").write_text("{}")
    assert read_image_processor(folder)[0] == folder / "preprocessor_config.json"


def test_import_loads_neither_torch_nor_the_library() -> None:
    program = (
        "import sys, msn_eval.checkpoints.hf_folder; print({'torch', 'huggingface_hub', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
