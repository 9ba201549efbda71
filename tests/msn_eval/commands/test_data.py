"""`msn-eval data verify`: what is printed and written, and the codes it ends with."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from msn_eval.cli import main
from msn_eval.commands import data
from msn_eval.data import image_info, read_dataset
from msn_eval.data.dataset import class_map_sha256
from msn_eval.data.hashing import content_sha256, hash_images
from msn_eval.data.image_info import ImageInfo, inspect_image
from msn_eval.data.images import ImageSet
from msn_eval.errors import UsageError

Capture = pytest.CaptureFixture[str]


def verify(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    data.add_options(parser)
    return data.run(parser.parse_args(["verify", *map(str, arguments)]), [])


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Return an image folder of two classes, one image of which stands in both splits."""
    root = tmp_path / "pets"
    for split, names in (("train", ("ant/1.png", "ant/2.png", "bee/1.png")), ("val", ("ant/8.png", "bee/9.png"))):
        for number, name in enumerate(names):
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shared = (split, name) in (("train", "bee/1.png"), ("val", "ant/8.png"))
            size = (5, 5) if shared else (number + 1, 4 if split == "val" else 3)
            Image.new("RGB" if number else "L", size).save(path)
    (root / "train" / "bee" / "1.png").write_bytes((root / "val" / "ant" / "8.png").read_bytes())
    (root / "val" / "notes.txt").touch()
    return root


def test_report_of_a_valid_data_set(pets: Path, capsys: Capture) -> None:
    assert verify(pets) == 0
    val = read_dataset(str(pets)).val
    assert (
        capsys.readouterr().out
        == f"""\
data         pets

train        3 images, 2 classes
  per class  1 (bee) to 2 (ant) images
  passed     0 files passed over: dotfiles and other suffixes
  kinds      PNG L 2, PNG RGB 1
  sizes      1 x 3 (ant/1.png) to 5 x 5 (bee/1.png)
  EXIF       0 with an orientation tag, which is ignored; 0 damaged
  duplicates 0 images with the bytes of an earlier one

val          2 images, 2 classes
  per class  1 (ant) to 1 (ant) images
  passed     1 file passed over: dotfiles and other suffixes
  kinds      PNG L 1, PNG RGB 1
  sizes      2 x 4 (bee/9.png) to 5 x 5 (ant/8.png)
  EXIF       0 with an orientation tag, which is ignored; 0 damaged
  duplicates 0 images with the bytes of an earlier one

val in train 1 of 2 images, byte for byte
             val/ant/8.png = train/bee/1.png
data.sha256  {content_sha256(val.ids, hash_images(val, cache_dir=None))}
class map    {class_map_sha256(("ant", "bee"))}
verdict      every image can be used
"""
    )


def test_damaged_image_is_listed_and_ends_with_21(pets: Path, capsys: Capture) -> None:
    (pets / "val" / "bee" / "9.png").write_bytes(b"")
    assert verify(pets) == 21
    out = capsys.readouterr().out
    assert f"UNREADABLE   {pets / 'val' / 'bee' / '9.png'}: the file is empty\n" in out
    assert out.endswith("verdict      1 image cannot be used\n")


def test_shared_images_beyond_ten_are_counted(pets: Path, capsys: Capture) -> None:
    for number in range(12):
        content = (pets / "val" / "ant" / "8.png").read_bytes()
        (pets / "val" / "ant" / f"copy{number:02d}.png").write_bytes(content)
    verify(pets)
    out = capsys.readouterr().out
    assert (out.count(" = train/bee/1.png"), "             and 3 more\n" in out) == (10, True)
    assert "val in train 13 of 14 images, byte for byte\n" in out


def test_written_manifest_is_found_to_agree(pets: Path, tmp_path: Path, capsys: Capture) -> None:
    assert verify(pets, "--write-manifest", tmp_path / "m") == 0
    assert len((tmp_path / "m").read_bytes().splitlines()) == 5
    capsys.readouterr()
    assert verify(pets, "--manifest", tmp_path / "m") == 0
    assert "manifest     5 images listed: 0 changed, 0 missing, 0 extra\n" in capsys.readouterr().out


def test_flipped_pixels_that_still_decode_are_found_by_the_manifest(
    pets: Path, tmp_path: Path, capsys: Capture
) -> None:
    verify(pets, "--write-manifest", tmp_path / "m")
    Image.new("RGB", (2, 4), (1, 2, 3)).save(pets / "val" / "bee" / "9.png")
    (pets / "train" / "ant" / "1.png").rename(pets / "train" / "ant" / "3.png")
    capsys.readouterr()
    assert verify(pets, "--manifest", tmp_path / "m") == 21
    assert capsys.readouterr().out.endswith("""\
manifest     5 images listed: 1 changed, 1 missing, 1 extra
CHANGED      val/bee/9.png
MISSING      train/ant/1.png
EXTRA        train/ant/3.png
verdict      the data set differs from the manifest
""")


def test_manifest_of_a_damaged_data_set_is_not_written(pets: Path, tmp_path: Path, capsys: Capture) -> None:
    (pets / "val" / "bee" / "9.png").write_bytes(b"")
    assert verify(pets, "--write-manifest", tmp_path / "m") == 21
    assert (tmp_path / "m").exists() is False
    assert capsys.readouterr().err == f"{tmp_path / 'm'}: not written, since 1 image cannot be used\n"


def test_manifest_is_not_replaced_by_what_is_compared_with_it(pets: Path, tmp_path: Path) -> None:
    verify(pets, "--write-manifest", tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(UsageError, match="would replace the manifest that is compared with"):
        verify(pets, "--manifest", tmp_path / "m", "--write-manifest", pets / ".." / "m")
    assert (tmp_path / "m").read_bytes() == before


def test_manifest_that_cannot_be_written_is_reported_before_an_image_is_read(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--write-manifest"):
        verify(tmp_path / "no data set", "--write-manifest", tmp_path / "file" / "m")


@pytest.mark.parametrize("workers", ["-1", "two", "1.5", "", "99999", "²"])
def test_number_of_workers_is_a_number(pets: Path, workers: str) -> None:
    with pytest.raises(UsageError, match="neither auto nor a number from 0 to 9999"):
        verify(pets, f"--workers={workers}")


def test_as_many_processes_are_started_as_requested(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[int] = []

    def inspect(split: str, images: ImageSet, count: int) -> Iterator[ImageInfo]:
        workers.append(count)
        return (inspect_image(images.source, image_id) for image_id in images.ids)

    monkeypatch.setattr(image_info, "_inspect_in_processes", inspect)
    verify(pets, "--workers", "3")
    assert workers == [3, 3]


def test_hostile_names_stay_on_their_line(pets: Path, capsys: Capture) -> None:
    (pets / "val" / "ant" / "x\nverdict\x1b[2J\udcff.png").write_bytes(b"")
    assert verify(pets) == 21
    out = capsys.readouterr().out
    assert f"UNREADABLE   {pets}/val/ant/x\\x0averdict\\x1b[2J\\udcff.png: the file is empty\n" in out


def test_names_that_look_alike_are_a_warning_that_tells_them_apart(pets: Path, capsys: Capture) -> None:
    for name in ("caf\u00e9.png", "cafe\u0301.png"):
        Image.new("RGB", (2, 2)).save(pets / "val" / "ant" / name)
    assert verify(pets) == 0
    assert (
        "WARNING      val: ant/cafe\u0301.png ('ant/cafe\\u0301.png') and ant/caf\u00e9.png ('ant/caf\\xe9.png') "
        "differ only by case or Unicode normalisation\n"
    ) in capsys.readouterr().out


def as_json(pets: Path, capsys: Capture, *arguments: str | Path) -> Mapping[str, Any]:
    capsys.readouterr()
    verify(pets, "--json", *arguments)
    facts = json.loads(capsys.readouterr().out)
    assert isinstance(facts, dict)
    return facts


def test_json_has_the_same_content(pets: Path, capsys: Capture) -> None:
    facts = as_json(pets, capsys)
    val = read_dataset(str(pets)).val
    hashed = content_sha256(val.ids, hash_images(val, cache_dir=None))
    assert facts == {
        "name": "pets",
        "sound": True,
        "splits": {
            "train": facts["splits"]["train"],
            "val": {
                "images": 2,
                "classes": 2,
                "class_sizes": {"ant": 1, "bee": 1},
                "passed_over": 1,
                "kinds": {"PNG L": 1, "PNG RGB": 1},
                "turned": 0,
                "damaged_exif": 0,
                "smallest": {"image": "bee/9.png", "width": 2, "height": 4},
                "largest": {"image": "ant/8.png", "width": 5, "height": 5},
                "unreadable": [],
                "duplicates": 0,
                "look_alikes": [],
                "content_sha256": hashed,
            },
        },
        "val_in_train": {"images": 1, "first": [{"val": "ant/8.png", "train": "bee/1.png"}]},
        "data_sha256": hashed,
        "class_map_sha256": class_map_sha256(("ant", "bee")),
        "manifest": None,
        "warnings": [],
    }


def test_json_lists_damage_and_differences(pets: Path, tmp_path: Path, capsys: Capture) -> None:
    verify(pets, "--write-manifest", tmp_path / "m")
    (pets / "val" / "bee" / "9.png").write_bytes(b"\x1f\x8b")
    (pets / "val" / "ant" / "Caf\udce9.png").write_bytes(b"")
    facts = as_json(pets, capsys, "--manifest", tmp_path / "m")
    assert [(image["image"], image["reason"]) for image in facts["splits"]["val"]["unreadable"]] == [
        ("ant/Caf\udce9.png", "the file is empty"),
        ("bee/9.png", "a gzip file under an image name; unpack it"),
    ]
    assert facts["manifest"] == {
        "listed": 5,
        "changed": ["val/bee/9.png"],
        "missing": [],
        "extra": ["val/ant/Caf\udce9.png"],
    }
    assert facts["sound"] is False


PROGRAM = """
import argparse, logging, sys
from msn_eval.cli import main
from msn_eval.commands import data
logging.getLogger('msn_eval').setLevel(logging.INFO)
parser = argparse.ArgumentParser()
data.add_options(parser)
data.run(parser.parse_args(['verify', sys.argv[1]]), [])
assert 'torch' not in sys.modules
"""


def test_no_progress_is_drawn_where_stderr_is_not_a_terminal(pets: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(pets)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_is_drawn_on_a_terminal(pets: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    environment = dict(os.environ, TERM="xterm", COLUMNS="120")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pets)], stdout=subprocess.DEVNULL, stderr=follower, env=environment
    )
    os.close(follower)
    drawn = os.read(leader, 100_000).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "train" in drawn


@pytest.mark.parametrize("out", ["elsewhere/deep", "photos"])
def test_split_class_folders_are_a_data_set_of_the_same_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    names = [f"{label}/{number}.png" for label in ("cat", "dog, or wolf") for number in range(5)]
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), int(name[-5]), 0)).save(tmp_path / "photos" / name)
    assert main(["data", "split", str(tmp_path / "photos"), "--out", str(tmp_path / out), "--val-per-class", "2"]) == 0
    table = tmp_path / out / "photos.csv"
    assert capsys.readouterr().out == f"6 train, 4 val images: --data csv:{table}\n"
    data = read_dataset(f"csv:{table}")
    assert (data.name, sorted(data.train.ids + data.val.ids)) == ("photos", names)
    assert main(["data", "verify", f"csv:{table}"]) == 0


@pytest.mark.parametrize(
    "options", [["--val-share", "0"], ["--val-share", "1.0"], ["--val-share", "20"], ["--val-per-class", "0"]]
)
def test_split_of_an_impossible_size_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["data", "split", str(tmp_path), "--out", str(tmp_path / "out"), *options]) == 2
    assert options[0] in capsys.readouterr().err
