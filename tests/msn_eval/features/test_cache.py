import hashlib
import json
import logging
import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from msn_eval.data.images import EvalTransform
from msn_eval.errors import StoreError
from msn_eval.features import cache as feature_cache
from msn_eval.features.cache import (
    FeatureFolder,
    FeatureKey,
    describe_feature_folder,
    find_feature_folder,
    find_listed,
    list_feature_folders,
    open_feature_folder,
    read_manifests,
    read_rows,
    remove_feature_folder,
    verify_feature_folder,
    write_shard,
)
from msn_eval.files.json_records import canonical_json

KEY = FeatureKey(
    weights="00" * 32,
    arch="vit_small_16_224",
    network="target_encoder",
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
WIDTH = 6
GOLDEN = "b6370c8fbf91cd4193895ea790206e4e"


def content_of(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def rows_of(contents: Sequence[str], *, shift: float = 0.0) -> Tensor:
    """Return features that identify each content."""
    return torch.tensor([[byte + shift for byte in bytes.fromhex(content)[:WIDTH]] for content in contents]).float()


def keep(folder: FeatureFolder, contents: Sequence[str], *, shift: float = 0.0) -> None:
    write_shard(folder, contents, [f"val/{content[:4]}.jpg" for content in contents], rows_of(contents, shift=shift))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CONTENTS = [content_of(number) for number in range(24)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(cache: Path) -> FeatureFolder:
    return open_feature_folder(cache, KEY, checkpoint="vit.pth")


# The address.


@pytest.mark.parametrize("name", [field.name for field in fields(FeatureKey) if field.name != "transform"])
def test_address_depends_on_every_field(name: str) -> None:
    assert replace(KEY, **{name: "changed"}).digest != KEY.digest


@pytest.mark.parametrize("name", [field.name for field in fields(EvalTransform)])
def test_address_depends_on_every_field_of_the_transform(name: str) -> None:
    assert replace(KEY, transform={**KEY.transform, name: "changed"}).digest != KEY.digest


def test_address_of_a_known_key_is_stable() -> None:
    """Another address makes every cached feature unusable."""
    assert KEY.digest == GOLDEN


# Opening a folder.


def test_feature_folder_describes_its_key(folder: FeatureFolder) -> None:
    assert describe_feature_folder(folder.path) == ("vit.pth", json.loads(json.dumps(KEY.as_json())))


def test_opening_again_updates_the_time_of_use(cache: Path, folder: FeatureFolder) -> None:
    os.utime(folder.path / "key.json", (1.0, 1.0))
    open_feature_folder(cache, KEY, checkpoint="vit.pth")
    assert (folder.path / "key.json").stat().st_mtime > time.time() - 60


def test_opening_a_feature_folder_of_another_user_updates_the_time_of_use(
    cache: Path, folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    before = (folder.path / "key.json").stat().st_ino
    monkeypatch.setattr(os, "utime", refuse)
    open_feature_folder(cache, KEY, checkpoint="vit.pth")
    assert (folder.path / "key.json").stat().st_ino != before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 3, "checkpoint": "x"}', "[" * 100_000, "\xff"])
def test_damaged_key_is_unknown_until_the_feature_folder_is_opened_again(
    cache: Path, folder: FeatureFolder, text: str
) -> None:
    (folder.path / "key.json").write_text(text, encoding="latin-1")
    unknown = describe_feature_folder(folder.path)
    open_feature_folder(cache, KEY, checkpoint="vit.pth")
    assert (unknown, describe_feature_folder(folder.path)[0]) == (("unknown", {}), "vit.pth")


def test_file_in_the_place_of_a_feature_folder_is_an_error_that_names_the_option(cache: Path) -> None:
    (cache / "features").mkdir(parents=True)
    (cache / "features" / KEY.digest).touch()
    with pytest.raises(StoreError, match="Give another --cache folder"):
        open_feature_folder(cache, KEY, checkpoint="vit.pth")
    with pytest.raises(StoreError, match=r"cannot be listed: Not a directory\nCheck the --cache folder"):
        find_listed(find_feature_folder(cache, KEY), {CONTENTS[0]})


# What is written is read.


def test_rows_come_back_bit_for_bit(folder: FeatureFolder) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    write_shard(folder, CONTENTS[:5], list("abcde"), values)
    read, found = read_rows(folder, CONTENTS[:5])
    assert read is not None
    assert (read.numpy().tobytes(), found) == (values.numpy().tobytes(), [True] * 5)


def test_rows_from_several_shards_come_in_the_requested_order(folder: FeatureFolder) -> None:
    keep(folder, CONTENTS[:5])
    keep(folder, CONTENTS[5:9])
    wanted = [CONTENTS[row] for row in (7, 0, 8, 4, 5)]
    read, _ = read_rows(folder, wanted)
    assert read is not None
    assert torch.equal(read, rows_of(wanted))


def test_missing_rows_are_reported_and_zero(folder: FeatureFolder) -> None:
    keep(folder, CONTENTS[1:2])
    read, found = read_rows(folder, CONTENTS[:3])
    assert read is not None
    assert (found, read[[0, 2]].count_nonzero()) == ([False, True, False], 0)


def test_content_requested_twice_is_returned_twice(folder: FeatureFolder) -> None:
    keep(folder, CONTENTS[:2])
    read, found = read_rows(folder, [CONTENTS[1], CONTENTS[1]])
    assert read is not None
    assert (torch.equal(read, rows_of([CONTENTS[1]] * 2)), found) == (True, [True, True])


@pytest.mark.parametrize("shifts", [(0.25, 0.5), (0.5, 0.25)])
def test_content_in_two_shards_is_read_from_the_first_by_name_whichever_was_written_first(
    folder: FeatureFolder, shifts: tuple[float, float]
) -> None:
    for shift in shifts:
        keep(folder, CONTENTS[:2], shift=shift)
    values, _ = read_rows(folder, CONTENTS[:2])
    first = load(min(folder.path.glob("*.safetensors")).read_bytes())
    assert values is not None
    assert torch.equal(values, first["values"])


def test_missing_feature_folder_has_no_rows(cache: Path) -> None:
    assert read_rows(find_feature_folder(cache, KEY), CONTENTS[:2]) == (None, [False, False])


def test_rows_of_another_feature_folder_are_never_returned(cache: Path, folder: FeatureFolder) -> None:
    keep(open_feature_folder(cache, replace(KEY, tap="mean"), checkpoint="vit.pth"), CONTENTS)
    assert read_rows(folder, CONTENTS) == (None, [False] * len(CONTENTS))


def test_listing_finds_the_wanted_contents_and_reads_no_shard(folder: FeatureFolder) -> None:
    keep(folder, CONTENTS[:5])
    keep(folder, CONTENTS[3:8])
    for shard in folder.path.glob("*.safetensors"):
        shard.unlink()
    assert find_listed(folder, set(CONTENTS[4:20])) == set(CONTENTS[4:8])


@pytest.mark.parametrize("image_id", ["n01/\udcff\udcfe.jpg", "n01/ü→.jpg", 'n01/",\\"seal\\":\\"', "a\nb\x00"])
def test_manifest_keeps_ids_of_any_bytes(folder: FeatureFolder, image_id: str) -> None:
    write_shard(folder, CONTENTS[:1], [image_id], rows_of(CONTENTS[:1]))
    (manifest,) = read_manifests(folder)
    assert manifest.images == (image_id,)


def test_same_rows_written_twice_are_one_shard(folder: FeatureFolder) -> None:
    keep(folder, CONTENTS[:5])
    before = names_in(folder.path)
    keep(folder, CONTENTS[:5])
    assert names_in(folder.path) == before


def test_shard_is_on_disk_before_its_manifest_has_a_name(
    folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the order of the calls protects against a power failure; a killed process does not show it."""
    done: list[str] = []
    sync, put = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        done.append("sync folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "sync file")
        sync(handle)

    def note_replace(path: Path, target: Path) -> Path:
        done.append(f"name {target.suffix}")
        return put(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    keep(folder, CONTENTS[:2])
    assert done == ["sync file", "name .safetensors", "sync folder", "sync file", "name .json", "sync folder"]


# Damage: one corruption at a time, of a folder of three shards; another folder has other values for the same contents.


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Two valid folders, and random choices from them."""

    folder: FeatureFolder
    other: FeatureFolder
    files: Mapping[Path, bytes]
    chance: random.Random

    def reset(self) -> None:
        for folder in (self.folder, self.other):
            shutil.rmtree(folder.path)
            folder.path.mkdir()
        for path, content in self.files.items():
            path.write_bytes(content)

    def shard(self) -> Path:
        return self.chance.choice(sorted(self.folder.path.glob("*.safetensors")))

    def manifest(self) -> Path:
        return self.shard().with_suffix(".json")

    def two(self, suffix: str) -> list[Path]:
        return self.chance.sample(
            sorted(path.with_suffix(suffix) for path in self.folder.path.glob("*.safetensors")), 2
        )

    def of_other(self, suffix: str) -> Path:
        return self.chance.choice(sorted(self.other.path.glob("*.safetensors"))).with_suffix(suffix)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a thousand writes; there is no power failure here
    cache_dir = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=cache_dir if cache_dir.is_dir() else tmp_path) as folder:
        yield make_scene(Path(folder) / "cache")


def make_scene(cache: Path) -> Scene:
    folder = open_feature_folder(cache, KEY, checkpoint="vit.pth")
    other = open_feature_folder(cache, replace(KEY, tap="mean"), checkpoint="vit.pth")
    for start in range(0, 24, 8):
        keep(folder, CONTENTS[start : start + 8])
        keep(other, CONTENTS[start : start + 8], shift=0.5)
    files = {path: path.read_bytes() for folder in (folder.path, other.path) for path in folder.iterdir()}
    return Scene(folder=folder, other=other, files=files, chance=random.Random(1))


def put(path: Path, content: bytes) -> None:
    """Replace a file; some file systems wait for the disk when one is truncated and written again."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    put(path, content)


def cut(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    put(path, content[: chance.randrange(len(content))])


def blank(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content) - 1)
    content[start : start + 256] = bytes(len(content[start : start + 256]))
    put(path, content if bytes(content) != path.read_bytes() else b"")


def append(path: Path, chance: random.Random) -> None:
    put(path, path.read_bytes() + chance.randbytes(chance.choice((1, 7, 4096))))


def swap(paths: Sequence[Path]) -> None:
    first, second = (path.read_bytes() for path in paths)
    put(paths[0], second)
    put(paths[1], first)


def sealed(text: bytes) -> bytes:
    """Seal any text as an attacker could."""
    return text + b',"seal":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def resealed(manifest: Mapping[str, object], *, schema: object = 1) -> bytes:
    return sealed(canonical_json({"manifest": manifest, "schema": schema}).removesuffix("}").encode())


WRONG = (None, True, -1, 10**30, 1e308, 0.5, "", "x", "../../../x.safetensors", "/dev/zero", "\x00", [], {}, [[]], ["x"],
         [None] * 8, ["0" * 64] * 8, [["0" * 64]] * 8, [10**63] * 8, {"0" * 64: 1}, [{}] * 8)  # fmt: skip
TEXTS = (b"", b"[]", b"null", b"{", b"{}", b'{"manifest":null', b'{"manifest":[]', b'{"manifest":{},"schema":1',
         b"[" * 100_000, b'{"manifest":' * 50_000, b'{"schema":1e999', b'{"schema":NaN', b"\xff\xfe", b"\x00" * 4096,
         b"9" * 5_000, b'{"a' * 9)  # fmt: skip


def change_field(scene: Scene) -> None:
    """Change one field of a manifest and seal it again."""
    path = scene.manifest()
    content = json.loads(path.read_bytes())
    body = content["manifest"]
    name = scene.chance.choice([*sorted(set(body) - {"images"}), "schema", "another"])
    if name == "schema":
        put(path, resealed(body, schema=scene.chance.choice(WRONG[:1] + WRONG[2:])))
    elif name == "another" or scene.chance.random() < 0.8:
        put(path, resealed(body | {name: scene.chance.choice(WRONG)}))
    else:
        del body[name]
        put(path, resealed(body))


def write_any_text(scene: Scene) -> None:
    text = scene.chance.choice(TEXTS)
    put(scene.manifest(), scene.chance.choice((text, sealed(text))))


def shift_rows(scene: Scene) -> None:
    """Rotate the contents of a manifest and seal it again."""
    path = scene.manifest()
    body = json.loads(path.read_bytes())["manifest"]
    body["contents"] = body["contents"][1:] + body["contents"][:1]
    put(path, resealed(body))


def forge(scene: Scene) -> None:
    """Write a valid manifest for a shard that must not be accepted."""
    path = scene.manifest()
    body = json.loads(path.read_bytes())["manifest"]
    addresses = torch.tensor([list(bytes.fromhex(content)) for content in body["contents"]], dtype=torch.uint8)
    values = rows_of(body["contents"])
    packed = scene.chance.choice(
        [
            save({"contents": addresses, "values": values[:5]}),
            save({"contents": addresses[:5], "values": values[:5]}),
            save({"contents": addresses, "values": values.flatten()}),
            save({"contents": addresses, "values": values.double()}),
            save({"contents": addresses, "values": values.half()}),
            save({"contents": addresses, "values": values[None]}),
            save({"contents": addresses, "values": torch.zeros(8)[0]}),
            save({"contents": addresses.bfloat16(), "values": values}),
            save({"contents": addresses.flip(0).contiguous(), "values": values}),
            save({"contents": addresses[0, 0], "values": values}),
            save({"values": values}),
            save({"contents": addresses}),
            save({}),
            b"",
            b"\xff" * 100,
            b"\x80\x04}." * 10,
        ]
    )
    sha256 = hashlib.sha256(packed).hexdigest()
    path.unlink()
    path.with_suffix(".safetensors").unlink()
    (scene.folder.path / f"{sha256[:32]}.safetensors").write_bytes(packed)
    (scene.folder.path / f"{sha256[:32]}.json").write_bytes(
        resealed(body | {"sha256": sha256, "shard": f"{sha256[:32]}.safetensors", "bytes": len(packed)})
    )


def misplace(scene: Scene) -> None:
    """Replace a file by something that is not a regular file."""
    path = scene.chance.choice((scene.shard, scene.manifest))()
    kept = scene.folder.path.parent.parent / path.name
    path.replace(kept)
    match scene.chance.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(kept)
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.symlink_to(path)
        case _:
            path.symlink_to(scene.of_other(path.suffix))


def rename(scene: Scene) -> None:
    """Rename a shard and its manifest to a different valid name."""
    path = scene.shard()
    for suffix in (".safetensors", ".json"):
        path.with_suffix(suffix).rename(path.with_name(content_of(path)[:32] + suffix))


DAMAGES: dict[str, Callable[[Scene], object]] = {
    "flipped bit in a shard": lambda scene: flip(scene.shard(), scene.chance),
    "flipped bit in a manifest": lambda scene: flip(scene.manifest(), scene.chance),
    "cut shard": lambda scene: cut(scene.shard(), scene.chance),
    "cut manifest": lambda scene: cut(scene.manifest(), scene.chance),
    "zeros in a shard": lambda scene: blank(scene.shard(), scene.chance),
    "zeros in a manifest": lambda scene: blank(scene.manifest(), scene.chance),
    "bytes after a shard": lambda scene: append(scene.shard(), scene.chance),
    "bytes after a manifest": lambda scene: append(scene.manifest(), scene.chance),
    "manifest twice": lambda scene: put(scene.manifest(), scene.manifest().read_bytes() * 2),
    "two shards in each other's place": lambda scene: swap(scene.two(".safetensors")),
    "two manifests in each other's place": lambda scene: swap(scene.two(".json")),
    "shard of another folder": lambda scene: put(scene.shard(), scene.of_other(".safetensors").read_bytes()),
    "manifest of another folder": lambda scene: put(scene.manifest(), scene.of_other(".json").read_bytes()),
    "shard that is gone": lambda scene: scene.shard().unlink(),
    "shard by another name": rename,
    "changed field of a manifest": change_field,
    "any text as a manifest": write_any_text,
    "rows in another order": shift_rows,
    "forged shard": forge,
    "not a regular file": misplace,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_shard_is_quarantined_with_a_warning_and_its_rows_can_be_written_again(
    scene: Scene, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    for _ in range(52):  # a thousand in all
        scene.reset()
        caplog.clear()
        DAMAGES[kind](scene)
        values, found = read_rows(scene.folder, CONTENTS)
        kept = [row for row, is_present in enumerate(found) if is_present]
        lost = [content for content, is_present in zip(CONTENTS, found, strict=True) if not is_present]
        assert len(lost) in (8, 16)
        assert values is not None
        assert torch.equal(values[kept], rows_of([CONTENTS[row] for row in kept]))
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
        assert all("moved to" in record.getMessage() for record in caplog.records)
        assert names_in(scene.folder.path / "quarantine")
        caplog.clear()
        keep(scene.folder, lost)
        again, present = read_rows(scene.folder, CONTENTS)
        assert again is not None
        assert (all(present), torch.equal(again, rows_of(CONTENTS)), caplog.records) == (True, True, [])


def test_missing_manifest_loses_only_its_rows(scene: Scene) -> None:
    scene.manifest().unlink()
    assert read_rows(scene.folder, CONTENTS)[1].count(False) == 8


def test_files_of_another_feature_folder_are_quarantined_and_lose_nothing(scene: Scene) -> None:
    for path in scene.other.path.glob("*.*"):
        if path.name != "key.json":
            shutil.copy(path, scene.folder.path)
    values, found = read_rows(scene.folder, CONTENTS)
    assert values is not None
    assert (all(found), torch.equal(values, rows_of(CONTENTS))) == (True, True)


@pytest.mark.parametrize("width", [WIDTH + 1, 1])
def test_shard_of_another_width_is_never_mixed_in(folder: FeatureFolder, width: int) -> None:
    keep(folder, CONTENTS[:4])
    write_shard(folder, CONTENTS[4:8], list("abcd"), torch.ones(4, width))
    _, found = read_rows(folder, CONTENTS[:8])
    assert (sum(found), len(names_in(folder.path / "quarantine"))) == (4, 2)


def test_warning_names_the_shard_the_reason_and_the_quarantine(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    shard = scene.shard()
    shard.unlink()
    read_rows(scene.folder, CONTENTS)
    assert caplog.messages == [
        f"{shard}: its shard is missing; moved to {scene.folder.path / 'quarantine'}, its features are computed again"
    ]


def test_listing_quarantines_damaged_manifests(scene: Scene) -> None:
    flip(scene.manifest(), scene.chance)
    assert len(find_listed(scene.folder, set(CONTENTS))) == 16


def test_read_error_is_a_store_error_and_quarantines_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StoreError, match=r"cannot be read: Input/output error\nCheck the disk .*--no-cache"):
        read_rows(scene.folder, CONTENTS)
    assert not (scene.folder.path / "quarantine").exists()


def test_damaged_shard_that_cannot_be_moved_is_not_used(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    (scene.folder.path / "quarantine").touch()
    shard = scene.shard()
    flip(shard, scene.chance)
    _, found = read_rows(scene.folder, CONTENTS)
    assert (all(found), any(found)) == (False, True)
    assert "it could not be moved away (File exists), its features are computed again" in caplog.messages[0]


def test_unknown_files_in_a_feature_folder_are_neither_read_nor_moved(scene: Scene) -> None:
    unknown = ["notes.json", "package.json", f"{'G' * 32}.json", f".{'0' * 31}.json", f"{'0' * 32}.json.bak"]
    for name in unknown:
        (scene.folder.path / name).write_text("mine")
    _, found = read_rows(scene.folder, CONTENTS)
    assert all(found)
    assert [(scene.folder.path / name).read_text() for name in unknown] == ["mine"] * len(unknown)


@pytest.mark.parametrize("part", [Scene.shard, Scene.manifest], ids=["shard", "manifest"])
def test_verification_counts_valid_and_damaged_shards(scene: Scene, part: Callable[[Scene], Path]) -> None:
    flip(part(scene), scene.chance)
    assert (verify_feature_folder(scene.folder), verify_feature_folder(scene.folder)) == ((2, 1), (2, 0))


# Removal, and what meets it.


def test_removing_a_feature_folder_that_another_process_removed_is_not_an_error(folder: FeatureFolder) -> None:
    shutil.rmtree(folder.path)
    remove_feature_folder(folder)
    assert not folder.path.exists()


def test_removal_error_of_the_disk_is_a_store_error(folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StoreError, match="could not be removed: Permission denied"):
        remove_feature_folder(folder)


def test_only_folders_named_like_a_digest_are_feature_folders(cache: Path, folder: FeatureFolder) -> None:
    for name in ("notes", "0" * 31, "0" * 33, "Z" * 32):
        (cache / "features" / name).mkdir()
    (cache / "features" / ("0" * 32)).touch()
    assert list_feature_folders(cache) == [folder]


def test_feature_folder_removed_during_a_read_has_missing_rows_and_no_damage(
    folder: FeatureFolder, caplog: pytest.LogCaptureFixture
) -> None:
    keep(folder, CONTENTS[:4])
    manifests = read_manifests(folder)
    next(manifests)
    remove_feature_folder(folder)
    assert (read_rows(folder, CONTENTS[:4]), list(manifests), caplog.records) == ((None, [False] * 4), [], [])


def test_feature_folder_removed_during_verification_is_not_damaged(
    folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(folder, CONTENTS[:4])
    read = Path.read_bytes

    def read_and_remove(path: Path) -> bytes:
        content = read(path)
        remove_feature_folder(folder)
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_remove)
    assert verify_feature_folder(folder) == (0, 0)


@pytest.mark.parametrize("place", [(feature_cache, "write_atomically"), (tempfile, "TemporaryFile")])
def test_folder_that_is_pruned_while_something_is_written_to_it_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    folder = find_feature_folder(tmp_path, KEY)
    original = getattr(*place)
    prunes = iter([True, True, False, True])

    def write(*arguments: object, **options: object) -> object:
        if next(prunes, False):
            remove_feature_folder(folder)
        return original(*arguments, **options)

    monkeypatch.setattr(*place, write)
    open_feature_folder(tmp_path, KEY, checkpoint="vit.pth")
    keep(folder, CONTENTS)
    assert read_rows(folder, CONTENTS)[1] == [True] * len(CONTENTS)


# Rows that do not fit into memory.


def test_rows_mapped_from_a_file_equal_rows_in_memory_and_leave_no_file(
    folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep(folder, CONTENTS[:10])
    keep(folder, CONTENTS[10:])
    before = names_in(folder.path)
    expected, _ = read_rows(folder, CONTENTS)
    monkeypatch.setattr(feature_cache, "available_bytes", lambda: 2 * 4 * len(CONTENTS) * WIDTH - 1)

    with caplog.at_level(logging.INFO):
        values, found = read_rows(folder, CONTENTS, beyond_memory=True)

    assert "24 rows of 6 features" in caplog.text
    assert values is not None
    assert expected is not None
    assert torch.equal(values, expected)
    assert all(found)
    assert names_in(folder.path) == before


def test_rows_stay_in_memory_if_they_fit_or_mapping_is_not_allowed(
    folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep(folder, CONTENTS)
    with caplog.at_level(logging.INFO):
        read_rows(folder, CONTENTS, beyond_memory=True)
        monkeypatch.setattr(feature_cache, "available_bytes", lambda: 1)
        read_rows(folder, CONTENTS)

    assert "mapped from the disk" not in caplog.text


def test_full_disk_for_mapped_rows_is_a_store_error(folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    keep(folder, CONTENTS)
    monkeypatch.setattr(feature_cache, "available_bytes", lambda: 1)
    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(StoreError, match=r"576 bytes of features fit neither .*: No space left on device"):
        read_rows(folder, CONTENTS, beyond_memory=True)
