"""`msn-eval cache`: list, verify and prune cached features."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from msn_eval.cli import main
from msn_eval.data.images import EvalTransform
from msn_eval.features.cache import FeatureFolder, FeatureKey, open_feature_folder, verify_feature_folder, write_shard

Capture = pytest.CaptureFixture[str]
FolderMaker = Callable[..., FeatureFolder]
DAY = 24 * 3600


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.fixture
def make_folder(cache: Path) -> FolderMaker:
    """Return a function that fills a folder of some rows, of 256 values each, last used some days ago."""

    def make(
        name: str = "vit.pth", *, rows: int = 4, unused_days: float = 0.0, arch: str = "vit_small_16_224"
    ) -> FeatureFolder:
        key = FeatureKey(
            weights=name.encode("utf-8", "surrogatepass").hex(),
            arch=arch,
            network=None,
            code=None,
            tap="cls",
            transform=asdict(EvalTransform(resize=256, crop=224)),
            decoder="pillow 12.3",
            precision="fp32",
            device="cpu",
            compiled=False,
            torch="2.10.0",
            timm="1.0.20",
            extractor=1,
        )
        folder = open_feature_folder(cache, key, checkpoint=name)
        contents = [f"{row:064x}" for row in range(rows)]
        write_shard(folder, contents, contents, torch.ones(rows, 256))
        then = time.time() - unused_days * DAY
        for path in folder.path.iterdir():
            os.utime(path, (then, then))
        return folder

    return make


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def run_cache(capsys: Capture, *arguments: str | Path, code: int = 0) -> str:
    """Run the command, check its exit code, and return what it prints."""
    actual = main(["cache", *map(str, arguments)])
    output = capsys.readouterr()
    assert (actual, output.err if code == 0 else "") == (code, "")
    return output.out + output.err


def flip(folder: FeatureFolder, suffix: str = ".safetensors") -> None:
    path = min(folder.path.glob(f"{'?' * 32}{suffix}"))
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


# list


def test_empty_cache_lists_nothing(cache: Path, capsys: Capture) -> None:
    assert run_cache(capsys, "list", "--cache", cache) == f"0 sets of features, 0 B, in {cache}\n"


def test_list_shows_checkpoint_rows_size_and_age(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    folder = make_folder(unused_days=3.2)
    size = f"{size_of(folder.path) / 1000:.1f} kB"
    assert run_cache(capsys, "list", "--cache", cache).splitlines() == [
        f"{folder.digest[:12]}            4 rows  {size:>9}  used 3 days ago  "
        "vit.pth (vit_small_16_224, tap cls, 224 px, fp32 on cpu)",
        f"1 set of features, {size}, in {cache}",
    ]


def test_list_names_architectures_as_tables_do(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    make_folder(arch="vit_tiny_patch16_224?img_size=32&patch_size=4&depth=4")
    assert "(vit_tiny_depth4_patch4_32, tap cls, " in run_cache(capsys, "list", "--cache", cache)


def test_list_starts_with_the_last_used(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    for name, days in (("b.pth", 5.0), ("a.pth", 1.0), ("c.pth", 9.0)):
        make_folder(name, unused_days=days)
    assert re.findall(r"[abc]\.pth", run_cache(capsys, "list", "--cache", cache)) == ["a.pth", "b.pth", "c.pth"]


@pytest.mark.parametrize(
    ("seconds", "age"),
    [(1, "1 seconds"), (119, "119 seconds"), (121, "2 minutes"), (7201, "2 hours"), (-9999, "0 seconds")],
)
def test_age_is_printed_in_the_largest_unit_with_two_or_more(
    cache: Path, make_folder: FolderMaker, capsys: Capture, monkeypatch: pytest.MonkeyPatch, seconds: int, age: str
) -> None:
    make_folder()
    last = max(path.lstat().st_mtime for path in (cache / "features").rglob("*.*"))
    monkeypatch.setattr(time, "time", lambda: last + seconds)
    assert f"used {age} ago" in run_cache(capsys, "list", "--cache", cache)


def test_list_counts_the_caches_of_data_sets(cache: Path, capsys: Capture) -> None:
    (cache / "hashes").mkdir()
    (cache / "hashes" / "a.json").write_bytes(bytes(1500))
    (cache / "hashes" / "b.json").write_bytes(bytes(1500))
    assert run_cache(capsys, "list", "--cache", cache).splitlines()[0] == (
        "hashes                 2 files     3.0 kB  of data sets"
    )


def test_feature_folder_whose_key_is_lost_is_listed_as_unknown(
    cache: Path, make_folder: FolderMaker, capsys: Capture
) -> None:
    (make_folder().path / "key.json").unlink()
    assert run_cache(capsys, "list", "--cache", cache).splitlines()[0].endswith("ago  unknown")


HOSTILE = {
    "escapes": "\x1b[2J\x1b]0;owned\x07",
    "another direction": "gnp.\u202efdp\u2066",
    "new line": "x\n0 sets of features",
    "tab and return": "x\r\ty",
    "no UTF-8": "vit\udcff.pth",
    "long": "z" * 5_000,
}
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("arguments", [["list"], ["verify"], ["prune", "--all"]], ids=lambda arguments: arguments[0])
def test_hostile_name_is_printed_harmlessly(
    cache: Path, make_folder: FolderMaker, capsys: Capture, arguments: list[str], kind: str
) -> None:
    make_folder(HOSTILE[kind])
    lines = run_cache(capsys, *arguments, "--cache", cache).splitlines()
    assert (len(lines), RAW.findall("".join(lines)), max(map(len, lines)) < 1000) == (2, [], True)


def test_hostile_key_is_printed_harmlessly(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    folder = make_folder().path
    for key in (
        {name: text for name in ("arch", "tap", "precision") for text in HOSTILE.values()},
        {"transform": [[]]},
    ):
        (folder / "key.json").write_text(json.dumps({"checkpoint": [None], "key": key}))
        lines = run_cache(capsys, "list", "--cache", cache).splitlines()
        assert (len(lines), RAW.findall("".join(lines)), max(map(len, lines)) < 1000) == (2, [], True)


# verify


def test_undamaged_cache_is_verified(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    folder = make_folder()
    assert run_cache(capsys, "verify", "--cache", cache).splitlines() == [
        f"{folder.digest[:12]}        1 shard  no damage  vit.pth",
        "no damage",
    ]


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_flipped_bit_is_found_and_moved_away(
    cache: Path, make_folder: FolderMaker, capsys: Capture, suffix: str
) -> None:
    folder = make_folder()
    flip(folder, suffix)
    output = run_cache(capsys, "verify", "--cache", cache, code=22)
    assert f"{folder.digest[:12]}        1 shard  1 DAMAGED, moved to {folder.path / 'quarantine'}  vit.pth\n" in output
    assert sorted(path.suffix for path in (folder.path / "quarantine").iterdir()) == [".json", ".safetensors"]
    assert "\n1 damaged shard; its features are computed again when needed\n" in output
    assert run_cache(capsys, "verify", "--cache", cache).splitlines()[-1] == "no damage"
    assert " 0 rows " in run_cache(capsys, "list", "--cache", cache)


def test_damage_in_one_feature_folder_does_not_hide_that_in_another(
    cache: Path, make_folder: FolderMaker, capsys: Capture
) -> None:
    for name in ("a.pth", "b.pth", "c.pth"):
        flip(make_folder(name))
    assert "3 damaged shards; " in run_cache(capsys, "verify", "--cache", cache, code=22)


# prune


def test_prune_requires_an_option(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    folder = make_folder()
    output = run_cache(capsys, "prune", "--cache", cache, code=2)
    assert (output, folder.path.is_dir()) == (
        "UsageError: it is not specified what to remove\nPass --older-than DAYS, --max-bytes N or --all.\n",
        True,
    )


def test_prune_all_leaves_no_features(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    for name in ("a.pth", "b.pth"):
        make_folder(name)
    size = f"{size_of(cache / 'features') / 1000 - 8.192:.1f} kB"
    output = run_cache(capsys, "prune", "--all", "--cache", cache)
    assert (output.splitlines()[-1], list((cache / "features").iterdir())) == (
        f"2 sets of features, {size}, removed; 0 B kept",
        [],
    )


def test_prune_by_age_keeps_what_was_used_since(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    old, young = make_folder("old.pth", unused_days=8), make_folder("young.pth", unused_days=6)
    run_cache(capsys, "prune", "--older-than", "7", "--cache", cache)
    assert (old.path.exists(), young.path.exists()) == (False, True)


def test_feature_folder_that_is_being_made_is_not_old(cache: Path, capsys: Capture) -> None:
    (cache / "features" / ("0" * 32)).mkdir(parents=True)
    run_cache(capsys, "prune", "--older-than", "1", "--cache", cache)
    assert (cache / "features" / ("0" * 32)).exists()


def test_prune_by_size_removes_the_longest_unused_until_the_rest_fits(
    cache: Path, make_folder: FolderMaker, capsys: Capture
) -> None:
    folders = [make_folder(f"{days}.pth", rows=8, unused_days=days) for days in (1, 2, 3, 4)]  # about 10 kB each
    output = run_cache(capsys, "prune", "--max-bytes", "25k", "--cache", cache)
    assert ([folder.path.exists() for folder in folders], output.count("\n")) == ([True, True, False, False], 3)


def test_size_counts_what_remains_after_pruning_by_age(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    folders = [make_folder(f"{days}.pth", rows=8, unused_days=days) for days in (1, 2, 3, 4)]
    run_cache(capsys, "prune", "--max-bytes", "25k", "--older-than", "2.5", "--cache", cache)
    assert [folder.path.exists() for folder in folders] == [True, True, False, False]


def test_dry_run_prints_what_would_be_removed_and_keeps_it(
    cache: Path, make_folder: FolderMaker, capsys: Capture
) -> None:
    folder = make_folder()
    planned = run_cache(capsys, "prune", "--all", "--dry-run", "--cache", cache)
    kept = verify_feature_folder(folder) == (1, 0)
    assert (kept, planned.replace("would be removed", "removed")) == (
        True,
        run_cache(capsys, "prune", "--all", "--cache", cache),
    )


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("12000", True),
        ("12k", True),
        ("12 kB", True),
        ("0.012m", True),
        ("0.000012G", True),
        ("5kb", False),
        ("0", False),
    ],
)
def test_size_has_an_optional_unit(
    cache: Path, make_folder: FolderMaker, capsys: Capture, text: str, fits: bool
) -> None:
    folder = make_folder(rows=8)
    (folder.path / "filler").write_bytes(bytes(11_800 - size_of(folder.path)))
    run_cache(capsys, "prune", "--max-bytes", text, "--cache", cache)
    assert folder.path.exists() == fits


BAD_SIZES = ["", "k", "many", "-1", "5Ki", "1e9", "5 5", "nan", "1.k", "9" * 400, "٣k"]


@pytest.mark.parametrize(
    ("option", "message"),
    [(f"--max-bytes={text}", f"--max-bytes {text}: not a size") for text in BAD_SIZES]
    + [(f"--older-than={days}", f"--older-than {days}: out of range") for days in ("-1.0", "nan", "-inf")],
)
def test_invalid_size_or_age_is_a_usage_error(
    cache: Path, make_folder: FolderMaker, capsys: Capture, option: str, message: str
) -> None:
    folder = make_folder()
    output = run_cache(capsys, "prune", option, "--cache", cache, code=2)
    assert (message in output, folder.path.exists()) == (True, True)


def test_option_of_prune_is_refused_elsewhere(cache: Path, capsys: Capture) -> None:
    assert "unknown option --older-than" in run_cache(capsys, "list", "--older-than=3", "--cache", cache, code=2)


def test_missing_folder_is_a_usage_error(tmp_path: Path, capsys: Capture) -> None:
    output = run_cache(capsys, "list", "--cache", tmp_path / "nowhere", code=2)
    assert output == f"UsageError: {tmp_path / 'nowhere'}: no such folder\nGive the --cache folder of a run.\n"


def test_unknown_files_in_the_cache_are_left_alone(cache: Path, make_folder: FolderMaker, capsys: Capture) -> None:
    make_folder()
    for folder in (cache, cache / "features"):
        (folder / "notes").mkdir()
        (folder / "notes" / f"{'0' * 32}.json").write_text("mine")
        (folder / "README").write_text("mine")
    for arguments in (["list"], ["verify"], ["prune", "--all"]):
        run_cache(capsys, *arguments, "--cache", cache)
    assert sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()) == sorted(
        f"{folder}{name}" for folder in ("", "features/") for name in ("README", f"notes/{'0' * 32}.json")
    )


def test_feature_folder_that_is_a_link_is_verified_and_never_pruned(
    cache: Path, make_folder: FolderMaker, capsys: Capture, tmp_path: Path
) -> None:
    folder = make_folder()
    elsewhere = tmp_path / "elsewhere"
    folder.path.rename(elsewhere)
    folder.path.symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    verified = run_cache(capsys, "verify", "--cache", cache)
    output = run_cache(capsys, "prune", "--all", "--cache", cache)
    assert ("1 shard  no damage" in verified, "KEPT, it is a link to another folder" in output) == (True, True)
    assert (sorted(elsewhere.iterdir()), folder.path.is_symlink()) == (before, True)


def test_link_inside_a_feature_folder_counts_for_nothing(
    cache: Path, make_folder: FolderMaker, capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_bytes(bytes(10**7))
    folder = make_folder()
    (folder.path / "link").symlink_to(tmp_path / "mine")
    listed = run_cache(capsys, "list", "--cache", cache)
    run_cache(capsys, "prune", "--all", "--cache", cache)
    assert ("MB" in listed, (tmp_path / "mine").exists()) == (False, True)


def test_users_own_cache_may_be_missing(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "none")
    output = [
        run_cache(capsys, *arguments).splitlines()[-1] for arguments in (["list"], ["verify"], ["prune", "--all"])
    ]
    assert output == [
        f"0 sets of features, 0 B, in {tmp_path / 'none'}",
        "no damage",
        "0 sets of features, 0 B, removed; 0 B kept",
    ]


def test_unreadable_features_are_a_store_error(
    cache: Path, make_folder: FolderMaker, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    make_folder()
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "features: cannot be listed: Permission denied" in run_cache(capsys, "list", "--cache", cache, code=22)
