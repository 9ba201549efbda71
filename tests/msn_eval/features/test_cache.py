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

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from msn_eval.data.images import EvalTransform
from msn_eval.errors import StoreError
from msn_eval.features import cache as feature_cache
from msn_eval.features.cache import (
    Bank,
    FeatureKey,
    check_bank,
    describe_bank,
    find_bank,
    list_banks,
    listed_contents,
    open_bank,
    read_manifests,
    read_rows,
    remove_bank,
    sweep_pruned,
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
    """Give each content's features: numbers that nothing but the content says."""
    return torch.tensor([[byte + shift for byte in bytes.fromhex(content)[:WIDTH]] for content in contents]).float()


def keep(bank: Bank, contents: Sequence[str], *, shift: float = 0.0) -> None:
    write_shard(bank, contents, [f"val/{content[:4]}.jpg" for content in contents], rows_of(contents, shift=shift))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CONTENTS = [content_of(number) for number in range(24)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def bank(cache: Path) -> Bank:
    return open_bank(cache, KEY, checkpoint="vit.pth")


# The address.


def changed(value: object) -> object:
    match value:
        case None:
            return "something"
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case tuple():
            return (changed(value[0]), *value[1:])
        case Mapping():
            return {**value, "another": 1}
    raise AssertionError(f"nothing is known of {type(value)}")


@pytest.mark.parametrize("name", [field.name for field in fields(FeatureKey)])
def test_address_depends_on_every_field(name: str) -> None:
    assert replace(KEY, **{name: changed(getattr(KEY, name))}).digest != KEY.digest


@pytest.mark.parametrize("name", [field.name for field in fields(EvalTransform)])
def test_address_depends_on_every_fact_of_the_transform(name: str) -> None:
    transform = {**KEY.transform, name: changed(KEY.transform[name])}
    assert replace(KEY, transform=transform).digest != KEY.digest


@pytest.mark.parametrize("name", [field.name for field in fields(FeatureKey) if getattr(KEY, field.name) is None])
def test_nothing_and_the_word_for_it_have_different_addresses(name: str) -> None:
    assert replace(KEY, **{name: "None"}).digest != KEY.digest


def test_address_does_not_depend_on_the_order_of_the_transform() -> None:
    assert replace(KEY, transform=dict(reversed(KEY.transform.items()))).digest == KEY.digest


def test_address_is_the_one_it_has_always_been() -> None:
    """Whoever changes this throws away everybody's features."""
    assert KEY.digest == GOLDEN


def test_address_is_another_where_files_are_of_another_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_SCHEMA", 2)
    assert replace(KEY).digest != GOLDEN


# Opening a bank.


def test_bank_says_what_it_holds(bank: Bank) -> None:
    assert describe_bank(bank.folder) == ("vit.pth", json.loads(json.dumps(KEY.as_json())))


def test_bank_is_found_where_it_was_opened(cache: Path, bank: Bank) -> None:
    assert find_bank(cache, KEY) == bank


def test_finding_a_bank_makes_nothing(cache: Path) -> None:
    find_bank(cache, KEY)
    assert not cache.exists()


def test_opening_again_notes_the_use(cache: Path, bank: Bank) -> None:
    os.utime(bank.folder / "key.json", (1.0, 1.0))
    open_bank(cache, KEY, checkpoint="vit.pth")
    assert (bank.folder / "key.json").stat().st_mtime > time.time() - 60


def test_opening_a_bank_whose_key_is_of_another_user_notes_the_use(
    cache: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    before = (bank.folder / "key.json").stat().st_ino
    monkeypatch.setattr(os, "utime", refuse)
    open_bank(cache, KEY, checkpoint="vit.pth")
    assert (bank.folder / "key.json").stat().st_ino != before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": 3, "checkpoint": "x"}', "[" * 100_000, "\xff"])
def test_damaged_key_is_unknown_until_the_bank_is_opened_again(cache: Path, bank: Bank, text: str) -> None:
    (bank.folder / "key.json").write_text(text, encoding="latin-1")
    unknown = describe_bank(bank.folder)
    open_bank(cache, KEY, checkpoint="vit.pth")
    assert (unknown, describe_bank(bank.folder)[0]) == (("unknown", {}), "vit.pth")


def test_file_in_the_place_of_a_bank_is_an_error_that_names_the_option(cache: Path) -> None:
    (cache / "features").mkdir(parents=True)
    (cache / "features" / KEY.digest).touch()
    with pytest.raises(StoreError, match="Give another --cache folder"):
        open_bank(cache, KEY, checkpoint="vit.pth")


def test_file_in_the_place_of_a_bank_is_a_store_error_for_who_only_looks(cache: Path) -> None:
    (cache / "features").mkdir(parents=True)
    (cache / "features" / KEY.digest).touch()
    with pytest.raises(StoreError, match=r"cannot be listed: Not a directory\nCheck the --cache folder"):
        listed_contents(find_bank(cache, KEY), {CONTENTS[0]})


# What is written is read.


def test_rows_come_back_bit_for_bit(bank: Bank) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    write_shard(bank, CONTENTS[:5], list("abcde"), values)
    read, found = read_rows(bank, CONTENTS[:5])
    assert read is not None
    assert (read.numpy().tobytes(), found) == (values.numpy().tobytes(), [True] * 5)


def test_rows_come_in_the_order_asked_for_from_several_shards(bank: Bank) -> None:
    keep(bank, CONTENTS[:5])
    keep(bank, CONTENTS[5:9])
    asked = [CONTENTS[row] for row in (7, 0, 8, 4, 5)]
    read, _ = read_rows(bank, asked)
    assert read is not None
    assert torch.equal(read, rows_of(asked))


def test_rows_of_a_view_are_written_as_they_look(bank: Bank) -> None:
    write_shard(bank, CONTENTS[:3], list("abc"), rows_of(CONTENTS).T.contiguous().T[:3])
    read, _ = read_rows(bank, CONTENTS[:3])
    assert read is not None
    assert torch.equal(read, rows_of(CONTENTS[:3]))


def test_missing_rows_are_said_to_be_missing_and_are_zeros(bank: Bank) -> None:
    keep(bank, CONTENTS[1:2])
    read, found = read_rows(bank, CONTENTS[:3])
    assert read is not None
    assert (found, read[[0, 2]].count_nonzero()) == ([False, True, False], 0)


def test_content_that_stands_twice_in_the_list_is_found_twice(bank: Bank) -> None:
    keep(bank, CONTENTS[:2])
    read, found = read_rows(bank, [CONTENTS[1], CONTENTS[1]])
    assert read is not None
    assert (torch.equal(read, rows_of([CONTENTS[1]] * 2)), found) == (True, [True, True])


def test_content_that_stands_twice_in_a_shard_is_read(bank: Bank) -> None:
    keep(bank, [CONTENTS[0]] * 3)
    read, _ = read_rows(bank, CONTENTS[:1])
    assert read is not None
    assert torch.equal(read, rows_of(CONTENTS[:1]))


@pytest.mark.parametrize("shifts", [(0.25, 0.5), (0.5, 0.25)])
def test_content_in_two_shards_is_read_from_the_first_by_name_whichever_was_written_first(
    bank: Bank, shifts: tuple[float, float]
) -> None:
    for shift in shifts:
        keep(bank, CONTENTS[:2], shift=shift)
    values, _ = read_rows(bank, CONTENTS[:2])
    first = load(min(bank.folder.glob("*.safetensors")).read_bytes())
    assert values is not None
    assert torch.equal(values, first["values"])


def test_one_row_comes_back(bank: Bank) -> None:
    keep(bank, CONTENTS[:1])
    assert read_rows(bank, CONTENTS[:1])[1] == [True]


def test_no_rows_leave_no_files(bank: Bank) -> None:
    before = names_in(bank.folder)
    write_shard(bank, [], [], torch.empty(0, WIDTH))
    assert names_in(bank.folder) == before


def test_no_rows_asked_for_are_none(bank: Bank) -> None:
    keep(bank, CONTENTS[:1])
    assert read_rows(bank, []) == (None, [])


def test_bank_that_is_not_there_has_nothing(cache: Path) -> None:
    assert read_rows(find_bank(cache, KEY), CONTENTS[:2]) == (None, [False, False])


def test_rows_of_another_bank_are_never_served(cache: Path, bank: Bank) -> None:
    keep(open_bank(cache, replace(KEY, tap="mean"), checkpoint="vit.pth"), CONTENTS)
    assert read_rows(bank, CONTENTS) == (None, [False] * len(CONTENTS))


def test_listed_are_those_of_the_wanted_that_are_kept(bank: Bank) -> None:
    keep(bank, CONTENTS[:5])
    keep(bank, CONTENTS[3:8])
    assert listed_contents(bank, set(CONTENTS[4:20])) == set(CONTENTS[4:8])


def test_listing_reads_no_shard(bank: Bank) -> None:
    keep(bank, CONTENTS[:5])
    for shard in bank.folder.glob("*.safetensors"):
        shard.unlink()
    assert listed_contents(bank, set(CONTENTS)) == set(CONTENTS[:5])


@pytest.mark.parametrize("image_id", ["n01/\udcff\udcfe.jpg", "n01/ü→.jpg", 'n01/",\\"seal\\":\\"', "a\nb\x00"])
def test_id_of_any_bytes_is_kept_for_people(bank: Bank, image_id: str) -> None:
    write_shard(bank, CONTENTS[:1], [image_id], rows_of(CONTENTS[:1]))
    (manifest,) = read_manifests(bank)
    assert manifest.images == (image_id,)


def test_same_rows_written_twice_are_one_shard(bank: Bank) -> None:
    keep(bank, CONTENTS[:5])
    before = names_in(bank.folder)
    keep(bank, CONTENTS[:5])
    assert names_in(bank.folder) == before


@pytest.mark.parametrize(
    ("contents", "images"),
    [
        (["ab"], ["x"]),
        ([CONTENTS[0].upper()], ["x"]),
        (["0" * 63, "0" * 65], ["x", "y"]),
        (CONTENTS[:1], []),
        (["zz" * 32], ["x"]),
    ],
)
def test_what_is_no_hash_of_an_image_is_not_written(bank: Bank, contents: list[str], images: list[str]) -> None:
    with pytest.raises(ValueError, match=r"no hashes|1 contents but 0 images|non-hexadecimal"):
        write_shard(bank, contents, images, torch.zeros(len(contents), WIDTH))


@pytest.mark.parametrize("values", [torch.zeros(2, WIDTH), torch.zeros(1), torch.zeros(1, WIDTH).half()])
def test_values_that_no_reader_would_take_are_not_written(bank: Bank, values: Tensor) -> None:
    with pytest.raises(AssertionError):
        write_shard(bank, CONTENTS[:1], ["x"], values)


def test_shard_is_on_disk_before_its_manifest_has_a_name(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill proves nothing about a power cut; the order of the calls does."""
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
    keep(bank, CONTENTS[:2])
    assert done == ["sync file", "name .safetensors", "sync folder", "sync file", "name .json", "sync folder"]


# Damage: one corruption at a time, of a bank of three shards; another bank has other values for the same contents.


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Two sound banks, and what chance chooses in them."""

    bank: Bank
    other: Bank
    files: Mapping[Path, bytes]
    chance: random.Random

    def reset(self) -> None:
        for bank in (self.bank, self.other):
            shutil.rmtree(bank.folder)
            bank.folder.mkdir()
        for path, content in self.files.items():
            path.write_bytes(content)

    def shard(self) -> Path:
        return self.chance.choice(sorted(self.bank.folder.glob("*.safetensors")))

    def manifest(self) -> Path:
        return self.shard().with_suffix(".json")

    def two(self, suffix: str) -> list[Path]:
        return self.chance.sample(
            sorted(path.with_suffix(suffix) for path in self.bank.folder.glob("*.safetensors")), 2
        )

    def foreign(self, suffix: str) -> Path:
        return self.chance.choice(sorted(self.other.folder.glob("*.safetensors"))).with_suffix(suffix)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a thousand times over, and no power is cut here
    cache_dir = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=cache_dir if cache_dir.is_dir() else tmp_path) as folder:
        yield make_scene(Path(folder) / "cache")


def make_scene(cache: Path) -> Scene:
    bank = open_bank(cache, KEY, checkpoint="vit.pth")
    other = open_bank(cache, replace(KEY, tap="mean"), checkpoint="vit.pth")
    for start in range(0, 24, 8):
        keep(bank, CONTENTS[start : start + 8])
        keep(other, CONTENTS[start : start + 8], shift=0.5)
    files = {path: path.read_bytes() for folder in (bank.folder, other.folder) for path in folder.iterdir()}
    return Scene(bank=bank, other=other, files=files, chance=random.Random(1))


def put(path: Path, content: bytes) -> None:
    """Write a file anew: some file systems wait for the disk where one is cut and written again."""
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


def repeat(path: Path, chance: random.Random) -> None:
    put(path, path.read_bytes() * 2)


def swap(paths: Sequence[Path]) -> None:
    first, second = (path.read_bytes() for path in paths)
    put(paths[0], second)
    put(paths[1], first)


def sealed(text: bytes) -> bytes:
    """Seal any text as if we had written it: what a stranger with a hash function can do."""
    return text + b',"seal":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def resealed(manifest: Mapping[str, object], *, schema: object = 1) -> bytes:
    return sealed(canonical_json({"manifest": manifest, "schema": schema}).removesuffix("}").encode())


WRONG = (None, True, -1, 10**30, 1e308, 0.5, "", "x", "../../../x.safetensors", "/dev/zero", "\x00", [], {}, [[]], ["x"],
         [None] * 8, ["0" * 64] * 8, [["0" * 64]] * 8, [10**63] * 8, {"0" * 64: 1}, [{}] * 8)  # fmt: skip
TEXTS = (b"", b"[]", b"null", b"{", b"{}", b'{"manifest":null', b'{"manifest":[]', b'{"manifest":{},"schema":1',
         b"[" * 100_000, b'{"manifest":' * 50_000, b'{"schema":1e999', b'{"schema":NaN', b"\xff\xfe", b"\x00" * 4096,
         b"9" * 5_000, b'{"a' * 9)  # fmt: skip


def lie(scene: Scene) -> None:
    """Change one fact of a manifest and seal it again."""
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


def say_anything(scene: Scene) -> None:
    text = scene.chance.choice(TEXTS)
    put(scene.manifest(), scene.chance.choice((text, sealed(text))))


def shift_rows(scene: Scene) -> None:
    """Have a manifest name the right contents in another order, sealed."""
    path = scene.manifest()
    body = json.loads(path.read_bytes())["manifest"]
    body["contents"] = body["contents"][1:] + body["contents"][:1]
    put(path, resealed(body))


def forge(scene: Scene) -> None:
    """Vouch for a shard that no reader should take."""
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
    (scene.bank.folder / f"{sha256[:32]}.safetensors").write_bytes(packed)
    (scene.bank.folder / f"{sha256[:32]}.json").write_bytes(
        resealed(body | {"sha256": sha256, "shard": f"{sha256[:32]}.safetensors", "bytes": len(packed)})
    )


def misplace(scene: Scene) -> None:
    """Put something that is no plain file into a file's place."""
    path = scene.chance.choice((scene.shard, scene.manifest))()
    kept = scene.bank.folder.parent.parent / path.name
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
            path.symlink_to(scene.foreign(path.suffix))


def rename(scene: Scene) -> None:
    """Call a shard and its manifest by another name of our kind."""
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
    "manifest twice over": lambda scene: repeat(scene.manifest(), scene.chance),
    "two shards in each other's place": lambda scene: swap(scene.two(".safetensors")),
    "two manifests in each other's place": lambda scene: swap(scene.two(".json")),
    "shard of another bank": lambda scene: put(scene.shard(), scene.foreign(".safetensors").read_bytes()),
    "manifest of another bank": lambda scene: put(scene.manifest(), scene.foreign(".json").read_bytes()),
    "shard that is gone": lambda scene: scene.shard().unlink(),
    "shard by another name": rename,
    "one fact of a manifest": lie,
    "anything for a manifest": say_anything,
    "rows in another order": shift_rows,
    "forged shard": forge,
    "no plain file": misplace,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_shard_is_set_aside_with_a_warning_and_its_rows_are_written_again(
    scene: Scene, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    for _ in range(52):  # a thousand in all
        scene.reset()
        caplog.clear()
        DAMAGES[kind](scene)
        values, found = read_rows(scene.bank, CONTENTS)
        kept = [row for row, there in enumerate(found) if there]
        lost = [content for content, there in zip(CONTENTS, found, strict=True) if not there]
        assert len(lost) in (8, 16)
        assert values is not None
        assert torch.equal(values[kept], rows_of([CONTENTS[row] for row in kept]))
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
        assert all("moved to" in record.getMessage() for record in caplog.records)
        assert names_in(scene.bank.folder / "quarantine")
        caplog.clear()
        keep(scene.bank, lost)
        again, there = read_rows(scene.bank, CONTENTS)
        assert again is not None
        assert (all(there), torch.equal(again, rows_of(CONTENTS)), caplog.records) == (True, True, [])


def test_manifest_that_is_gone_loses_its_rows_alone(scene: Scene) -> None:
    scene.manifest().unlink()
    assert read_rows(scene.bank, CONTENTS)[1].count(False) == 8


def test_files_of_another_bank_are_set_aside_and_lose_nothing(scene: Scene) -> None:
    for path in scene.other.folder.glob("*.*"):
        if path.name != "key.json":
            shutil.copy(path, scene.bank.folder)
    values, found = read_rows(scene.bank, CONTENTS)
    assert values is not None
    assert (all(found), torch.equal(values, rows_of(CONTENTS))) == (True, True)


@pytest.mark.parametrize("width", [WIDTH + 1, 1])
def test_shard_of_another_width_is_never_mixed_in(bank: Bank, width: int) -> None:
    keep(bank, CONTENTS[:4])
    write_shard(bank, CONTENTS[4:8], list("abcd"), torch.ones(4, width))
    _, found = read_rows(bank, CONTENTS[:8])
    assert (sum(found), len(names_in(bank.folder / "quarantine"))) == (4, 2)


def test_warning_names_shard_reason_and_where_it_went(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    shard = scene.shard()
    shard.unlink()
    read_rows(scene.bank, CONTENTS)
    assert caplog.messages == [
        f"{shard}: its shard is missing; moved to {scene.bank.folder / 'quarantine'}, its features are computed again"
    ]


def test_listing_sets_damaged_manifests_aside(scene: Scene) -> None:
    flip(scene.manifest(), scene.chance)
    assert len(listed_contents(scene.bank, set(CONTENTS))) == 16


def test_disk_that_refuses_to_read_is_a_store_error_and_damages_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StoreError, match=r"cannot be read: Input/output error\nCheck the disk .*--no-cache"):
        read_rows(scene.bank, CONTENTS)
    assert not (scene.bank.folder / "quarantine").exists()


def test_damage_that_cannot_be_moved_away_is_a_store_error(scene: Scene) -> None:
    (scene.bank.folder / "quarantine").touch()
    shard = scene.shard()
    flip(shard, scene.chance)
    with pytest.raises(StoreError, match=r"is damaged .* could not be moved away: File exists"):
        read_rows(scene.bank, CONTENTS)


def test_foreign_files_in_a_bank_are_neither_read_nor_moved(scene: Scene) -> None:
    strangers = ["notes.json", "package.json", f"{'G' * 32}.json", f".{'0' * 31}.json", f"{'0' * 32}.json.bak"]
    for name in strangers:
        (scene.bank.folder / name).write_text("mine")
    _, found = read_rows(scene.bank, CONTENTS)
    assert all(found)
    assert [(scene.bank.folder / name).read_text() for name in strangers] == ["mine"] * len(strangers)


def test_check_counts_sound_and_damaged_shards(scene: Scene) -> None:
    flip(scene.shard(), scene.chance)
    assert (check_bank(scene.bank), check_bank(scene.bank)) == ((2, 1), (2, 0))


def test_check_finds_a_damaged_manifest(scene: Scene) -> None:
    flip(scene.manifest(), scene.chance)
    assert check_bank(scene.bank) == (2, 1)


# Removal, and what meets it.


def test_removed_bank_leaves_nothing(cache: Path, bank: Bank) -> None:
    keep(bank, CONTENTS[:3])
    remove_bank(bank)
    assert names_in(cache / "features") == []


def test_bank_that_somebody_else_removed_is_no_error(bank: Bank) -> None:
    shutil.rmtree(bank.folder)
    remove_bank(bank)
    assert not bank.folder.exists()


def test_bank_that_is_a_link_is_refused_and_keeps_what_it_leads_to(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f"{'0' * 32}.json").write_text("mine")
    (cache / "features").mkdir(parents=True)
    find_bank(cache, KEY).folder.symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match="is a link to elsewhere"):
        remove_bank(find_bank(cache, KEY))
    assert names_in(tmp_path / "mine") == [f"{'0' * 32}.json"]


def test_link_inside_a_bank_is_removed_and_not_what_it_leads_to(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (bank.folder / "link").symlink_to(tmp_path / "mine")
    remove_bank(bank)
    assert names_in(tmp_path / "mine") == ["file"]


def test_removal_that_the_disk_refuses_is_a_store_error(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StoreError, match="could not be removed: Permission denied"):
        remove_bank(bank)


def test_what_a_killed_removal_leaves_is_no_bank_and_is_swept_out(
    cache: Path, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        remove_bank(bank)
    monkeypatch.undo()
    left = (list_banks(cache), len(names_in(cache / "features")))
    sweep_pruned(cache)
    assert (left, names_in(cache / "features")) == (([], 1), [])


def test_banks_are_folders_called_as_ours_are(cache: Path, bank: Bank) -> None:
    for name in ("notes", "0" * 31, "0" * 33, "Z" * 32):
        (cache / "features" / name).mkdir()
    (cache / "features" / ("0" * 32)).touch()
    assert list_banks(cache) == [bank]


def test_cache_without_features_has_no_banks(cache: Path) -> None:
    assert list_banks(cache) == []


def prune_before(monkeypatch: pytest.MonkeyPatch, bank: Bank, suffix: str, *, made_anew: bool, times: int) -> None:
    """Have the bank removed whenever a file of that kind is about to be written, so many times."""
    write = feature_cache.write_atomically
    left = [times]

    def write_or_prune(path: Path, content: bytes) -> None:
        if path.suffix == suffix and left[0]:
            left[0] -= 1
            remove_bank(bank)
            if made_anew:
                bank.folder.mkdir()
        write(path, content)

    monkeypatch.setattr(feature_cache, "write_atomically", write_or_prune)


@pytest.mark.parametrize("made_anew", [False, True])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_rows_are_kept_though_the_bank_is_removed_while_they_are_written(
    bank: Bank, monkeypatch: pytest.MonkeyPatch, suffix: str, made_anew: bool
) -> None:
    prune_before(monkeypatch, bank, suffix, made_anew=made_anew, times=2)
    keep(bank, CONTENTS[:4])
    assert (read_rows(bank, CONTENTS[:4])[1], check_bank(bank)) == ([True] * 4, (1, 0))


def test_bank_that_is_removed_again_and_again_is_a_store_error(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_before(monkeypatch, bank, ".json", made_anew=False, times=100)
    with pytest.raises(StoreError, match="No such file or directory"):
        keep(bank, CONTENTS[:4])


def test_bank_is_opened_though_it_is_removed_meanwhile(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune_before(monkeypatch, find_bank(cache, KEY), ".json", made_anew=False, times=2)
    assert describe_bank(open_bank(cache, KEY, checkpoint="vit.pth").folder)[0] == "vit.pth"


def test_shard_that_comes_back_while_it_is_looked_for_is_no_damage(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank may be removed and written anew between the looks at a manifest and at its shard."""
    keep(bank, CONTENTS[:4])
    read = Path.read_bytes
    missed: list[Path] = []

    def miss_once(path: Path) -> bytes:
        if path.suffix == ".safetensors" and not missed:
            missed.append(path)
            raise FileNotFoundError(2, "No such file or directory")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", miss_once)
    assert (read_rows(bank, CONTENTS[:4])[1], len(missed)) == ([True] * 4, 1)


def test_bank_that_is_removed_between_manifest_and_shard_has_missing_rows_and_no_damage(
    bank: Bank, caplog: pytest.LogCaptureFixture
) -> None:
    keep(bank, CONTENTS[:4])
    manifests = read_manifests(bank)
    next(manifests)
    remove_bank(bank)
    assert (read_rows(bank, CONTENTS[:4]), list(manifests), caplog.records) == ((None, [False] * 4), [], [])


def test_bank_that_is_removed_while_it_is_checked_is_not_damaged(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(bank, CONTENTS[:4])
    read = Path.read_bytes

    def read_and_remove(path: Path) -> bytes:
        content = read(path)
        remove_bank(bank)
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_remove)
    assert check_bank(bank) == (0, 0)


# Rows that memory has no room for.


def test_rows_beyond_memory_are_those_in_memory_and_leave_no_file(
    bank: Bank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep(bank, CONTENTS[:10])
    keep(bank, CONTENTS[10:])
    before = names_in(bank.folder)
    expected, _ = read_rows(bank, CONTENTS)
    monkeypatch.setattr(feature_cache, "available_bytes", lambda: 2 * 4 * len(CONTENTS) * WIDTH - 1)

    with caplog.at_level(logging.INFO):
        values, found = read_rows(bank, CONTENTS, beyond_memory=True)

    assert "24 rows of 6 features" in caplog.text
    assert values is not None
    assert expected is not None
    assert torch.equal(values, expected)
    assert all(found)
    assert names_in(bank.folder) == before


def test_rows_stay_in_memory_where_it_has_room_or_that_was_not_asked(
    bank: Bank, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep(bank, CONTENTS)
    with caplog.at_level(logging.INFO):
        read_rows(bank, CONTENTS, beyond_memory=True)
        monkeypatch.setattr(feature_cache, "available_bytes", lambda: 1)
        read_rows(bank, CONTENTS)

    assert "stay on the disk" not in caplog.text


def test_a_disk_without_room_for_rows_beyond_memory_is_told(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    keep(bank, CONTENTS)
    monkeypatch.setattr(feature_cache, "available_bytes", lambda: 1)
    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(StoreError, match=r"has no room for 576 bytes of features, .*: No space left on device"):
        read_rows(bank, CONTENTS, beyond_memory=True)
