import subprocess
from pathlib import Path
from typing import Any

import pytest

from msn_eval.checkpoints.msn_release import MSN_RELEASES, fetch_msn, find_release, find_weights_folder
from msn_eval.errors import CheckpointError

FILES = {
    "vits16": "vits16_800ep.pth.tar",
    "vitb16": "vitb16_600ep.pth.tar",
    "vitl16": "vitl16_600ep.pth.tar",
    "vitb4": "vitb4_300ep.pth.tar",
    "vitl7": "vitl7_200ep.pth.tar",
}


@pytest.fixture
def mirror(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MSN_EVAL_WEIGHTS_URL", f"{server.host}/msn/")
    return server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


def test_five_networks_were_released() -> None:
    assert MSN_RELEASES == FILES


def test_error_for_an_unknown_name_suggests_the_nearest_and_lists_all_five() -> None:
    with pytest.raises(CheckpointError) as caught:
        find_release("vit16s")
    assert caught.value.exit_code == 20
    assert str(caught.value) == (
        "msn:vit16s: MSN released no network 'vit16s'. Did you mean vits16, vitb16 or vitl16?\n"
        "The released networks are msn:vits16, msn:vitb16, msn:vitl16, msn:vitb4, msn:vitl7."
    )


def test_first_fetch_downloads_and_the_second_does_not(mirror: Any, folder: Path) -> None:
    path = folder / FILES["vitb4"]
    assert (fetch_msn("vitb4"), path.read_bytes()) == (path, mirror.content)
    assert (fetch_msn("vitb4"), mirror.paths) == (path, ["/msn/vitb4_300ep.pth.tar"])


def test_file_that_exists_needs_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    folder.mkdir()
    (folder / FILES["vitl7"]).write_bytes(b"put here manually")
    assert fetch_msn("vitl7").read_bytes() == b"put here manually"


def test_hash_of_the_newest_download_is_written_as_sha256sum_reads_it(mirror: Any, folder: Path) -> None:
    path = fetch_msn("vits16")
    path.unlink()
    mirror.content += b"other"
    fetch_msn("vits16")
    done = subprocess.run(["sha256sum", "-c", f"{path.name}.sha256"], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "vits16_800ep.pth.tar: OK\n"


@pytest.mark.parametrize("variable", ["MSN_EVAL_OFFLINE", "HF_HUB_OFFLINE"])
def test_forbidden_network_is_not_used(
    mirror: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(CheckpointError) as caught:
        fetch_msn("vitb16")
    path = folder / "vitb16_600ep.pth.tar"
    assert str(caught.value) == (
        f"msn:vitb16: No such file: {path}, and ${variable} forbids to download it\n"
        f"Download {mirror.host}/msn/vitb16_600ep.pth.tar manually, on a machine with a network, and put it at {path}; "
        "$MSN_EVAL_WEIGHTS names another folder."
    )
    assert (mirror.paths, folder.exists()) == ([], False)


def test_offline_variable_set_to_0_forbids_nothing(mirror: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "0")
    assert fetch_msn("vitb16").is_file()


def test_failed_download_names_address_and_path(mirror: Any, folder: Path) -> None:
    mirror.errors = [404]
    with pytest.raises(CheckpointError) as caught:
        fetch_msn("vitl16")
    assert str(caught.value).startswith(f"{mirror.host}/msn/{FILES['vitl16']}: Download failed: HTTP 404")
    assert f"put it at {folder / FILES['vitl16']}" in caught.value.hint


def test_default_address_is_that_of_the_authors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSN_EVAL_WEIGHTS_URL", raising=False)
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"https://dl\.fbaipublicfiles\.com/msn/vits16_800ep\.pth\.tar manually"):
        fetch_msn("vits16")


def test_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MSN_EVAL_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_weights_folder() == tmp_path / "msn-eval" / "weights"
