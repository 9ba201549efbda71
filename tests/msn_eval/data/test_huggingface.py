import errno
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from msn_eval.data import read_dataset, read_split
from msn_eval.data.hashing import hash_images
from msn_eval.data.images import ImageSet
from msn_eval.errors import DataError, StoreError, UsageError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Row = Mapping[str, object]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache of the library, without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def picture(number: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (3, 2), (number % 256, 7, 9)).save(content, kind)
    return content.getvalue()


def row(number: int, label: object, path: str | None = None, kind: str = "PNG") -> Row:
    return {"image": {"bytes": picture(number, kind), "path": path}, "label": label}


def features(classes: Sequence[str] = ("ant", "bee")) -> Any:
    return datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))})


def table(rows: Sequence[Row], kinds: Any = None) -> Any:
    return datasets.Dataset.from_list(list(rows), features=kinds or features())


def write(folder: Path, kinds: Any = None, **splits: Sequence[Row]) -> str:
    """Write Parquet files as the library does, and return the name after `hf:`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        n_files = 2 if len(rows) > 3 else 1
        for number in range(n_files):
            shard = table(rows, kinds).shard(n_files, number, contiguous=True)
            shard.to_parquet(folder / f"{split}-{number:05d}-of-{n_files:05d}.parquet")
    return str(folder)


def pair(label: object = 0) -> list[Row]:
    return [row(1, label, "a.png"), row(2, 1, "b.png")]


def read(name: str) -> Any:
    return read_dataset(f"hf:{name}")


def refused(name: str, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        read(name)
    return str(caught.value)


@pytest.fixture
def twins(tmp_path: Path) -> tuple[str, str]:
    """The same files as an image folder and as Parquet, whose rows are not sorted."""
    stored: dict[str, list[Row]] = {"train": [], "validation": []}
    classes = ["ant", "bee", "cät"]
    for split, folder, start in (("train", "train", 0), ("validation", "val", 50)):
        for number in range(9):
            kind = ("PNG", "JPEG", "GIF")[number % 3]
            label = (number * 2) % 3
            name = f"{number // 3}{'' if number < 6 else '-x'}.{kind.lower()}"
            file = tmp_path / "twin" / folder / classes[label] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(start + number, kind))
            stored[split].insert(0, row(start + number, label, name, kind))
    return str(tmp_path / "twin"), write(tmp_path / "parquet" / "twin", features(classes), **stored)


# --- the same images as an image folder


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["parquet", "image folder"])
def test_rows_have_ids_labels_classes_and_bytes_of_the_image_folder(
    twins: tuple[str, str], split: str, kind: str
) -> None:
    """The rows of an image folder hold no bytes, but the paths of the files."""
    folder = getattr(read_dataset(twins[0]), split)
    rows = getattr(read(twins[kind == "parquet"]), split)
    assert (rows.ids, rows.labels, rows.classes) == (folder.ids, folder.labels, folder.classes)
    assert [rows.source.read(image) for image in rows.ids] == [folder.source.read(image) for image in folder.ids]


# --- layouts


def test_folder_that_save_to_disk_wrote_is_read_without_a_cache(tmp_path: Path, cache: Path) -> None:
    stored = datasets.DatasetDict({"train": table(pair()), "validation": table(pair())})
    stored.save_to_disk(tmp_path / "saved")
    assert (read(str(tmp_path / "saved")).val.ids, cache.exists()) == (("ant/a.png", "bee/b.png"), False)


@pytest.mark.parametrize(
    ("splits", "chosen"),
    [
        (("train", "validation", "val", "test"), "validation"),
        (("train", "val", "test"), "val"),
        (("train", "test", "extra"), "test"),
    ],
)
def test_validation_images_are_those_of_the_first_split_of_the_rule(
    tmp_path: Path, splits: Sequence[str], chosen: str
) -> None:
    stored = {split: table([row(1, 0, f"{split}.png"), row(1, 1, "x.png")]) for split in splits}
    datasets.DatasetDict(stored).save_to_disk(tmp_path / "saved")
    assert f"ant/{chosen}.png" in read(str(tmp_path / "saved")).val.ids


def test_missing_split_is_refused_with_the_existing_ones_where_it_is_needed(tmp_path: Path) -> None:
    name = write(tmp_path / "d", test=pair())
    assert "No split 'train' (existing: test)" in refused(name)
    assert read_split(f"hf:{name}", "val").ids == ("ant/a.png", "bee/b.png")


def write_configs(folder: Path) -> str:
    for config in ("coarse", "fine"):
        write(folder / config, train=[row(1, 0, f"{config}.png")], validation=[row(1, 0, "x.png")])
    lines = "".join(f"- config_name: {config}\n  data_dir: {config}\n" for config in ("coarse", "fine"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{lines}---\n")
    return str(folder)


def test_configuration_of_a_folder_is_chosen_after_a_colon(tmp_path: Path) -> None:
    data = read(f"{write_configs(tmp_path / 'd')}:fine")
    assert (data.name, data.train.ids) == ("d:fine", ("ant/fine.png",))


def test_open_choice_of_a_configuration_lists_them(tmp_path: Path) -> None:
    text = refused(write_configs(tmp_path / "d"))
    assert "['coarse', 'fine']" in text
    assert f"Choose one: hf:{tmp_path / 'd'}:CONFIG." in text


def test_code_in_a_folder_is_refused_and_never_run(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "d", train=pair(), validation=pair()))
    (folder / "d.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    assert "has code of its own, which is never run here" in refused(str(folder))
    assert not (tmp_path / "canary").exists()


def test_damaged_parquet_is_an_error_of_the_data_set(tmp_path: Path) -> None:
    name = write(tmp_path / "d", train=pair(), validation=pair())
    file = next(Path(name).glob("train-*"))
    file.write_bytes(file.read_bytes()[:-50])
    assert refused(name).startswith(f"hf:{name}: The `datasets` library cannot load it: ")


# --- columns


def kinds_of(**columns: object) -> Any:
    return datasets.Features(columns)


def write_row(folder: Path, content: Row, **columns: object) -> str:
    """Write a data set of one row in each split, with these features."""
    return write(folder, kinds_of(**columns), train=[content], validation=[content])


IMAGE = {"bytes": picture(1), "path": "x.png"}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("species",), "species"),
        (("coarse_label", "fine_label"), "fine_label"),
        (("genus", "label"), "label"),
        (("fine_label", "labels"), "labels"),
    ],
)
def test_of_several_label_columns_the_usual_name_is_chosen(tmp_path: Path, names: Sequence[str], chosen: str) -> None:
    columns = {name: datasets.ClassLabel(names=[name]) for name in names}
    name = write_row(tmp_path / "d", {"image": IMAGE, **dict.fromkeys(names, 0)}, image=datasets.Image(), **columns)
    assert read(name).val.classes == (chosen,)


CLASS = datasets.ClassLabel(names=["a"])


@pytest.mark.parametrize(
    ("columns", "content", "text"),
    [
        (
            {"image": datasets.Image(), "genus": CLASS, "family": CLASS},
            {"image": IMAGE, "genus": 0, "family": 0},
            "split train: Several columns of classes (columns: image (PIL.Image.Image), genus (int64), family (int64))",
        ),
        (
            {"left": datasets.Image(), "right": datasets.Image(), "label": CLASS},
            {"left": IMAGE, "right": IMAGE, "label": 0},
            "Several columns of images",
        ),
        (
            {"text": datasets.Value("string"), "label": CLASS},
            {"text": "x", "label": 0},
            "No column of images (columns: text (string), label (int64))",
        ),
        (
            {"image": datasets.Image(), "label": datasets.Value("float32")},
            {"image": IMAGE, "label": 0.5},
            "No column of classes",
        ),
        (
            {"image": datasets.Image(), "caption": datasets.Value("string")},
            {"image": IMAGE, "caption": "a dog"},
            "No column of classes",
        ),
    ],
    ids=["several classes", "several images", "no image", "float", "caption"],
)
def test_open_or_missing_column_is_refused(tmp_path: Path, columns: dict[str, object], content: Row, text: str) -> None:
    assert text in refused(write_row(tmp_path / "d", content, **columns))


@pytest.mark.parametrize(
    ("column", "kind", "values", "classes"),
    [
        ("label", "string", ("dog", "cat"), ("cat", "dog")),
        ("class", "string", ("dog", "cat"), ("cat", "dog")),
        ("label", "int32", (10, 9, 0), ("0", "10", "9")),
    ],
)
def test_strings_and_integers_without_names_are_class_names(
    tmp_path: Path, column: str, kind: str, values: Sequence[object], classes: Sequence[str]
) -> None:
    kinds = kinds_of(image=datasets.Image(), **{column: datasets.Value(kind)})
    rows = [{"image": IMAGE, column: value} for value in values]
    assert read(write(tmp_path / "d", kinds, train=rows, validation=rows)).val.classes == classes


@pytest.mark.parametrize("layout", ["struct", "binary"])
def test_parquet_of_other_libraries_is_read_by_its_column_names(tmp_path: Path, layout: str) -> None:
    images = [{"bytes": picture(1), "path": "x.png"}] if layout == "struct" else [picture(1)]
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": images, "label": ["ant"]}), tmp_path / f"{split}.parquet")
    val = read(str(tmp_path)).val
    assert (val.ids, val.source.read(val.ids[0])) == (
        ("ant/x.png" if layout == "struct" else "ant/00000000.png",),
        picture(1),
    )


# --- labels


@pytest.mark.parametrize(("bad", "kind"), [(-1, None), (None, None), (-1, "int64")])
def test_rows_without_a_class_are_counted(tmp_path: Path, bad: object, kind: str | None) -> None:
    rows = [row(1, 0, "a.png"), row(2, bad, "b.png"), row(3, bad, "c.png")]
    kinds = kinds_of(image=datasets.Image(), label=datasets.Value(kind)) if kind else None
    text = refused(write(tmp_path / "d", kinds, train=pair(), test=rows))
    assert f"split test: no class for 2 of 3 rows (labels {bad}; first row 1)" in text


def test_label_beyond_the_class_names_is_refused(tmp_path: Path) -> None:
    plain = table([row(1, 2, "a.png")], kinds_of(image=datasets.Image(), label=datasets.Value("int64")))
    named = datasets.Dataset(plain.data, info=datasets.DatasetInfo(features=features()))
    datasets.DatasetDict({"train": named, "validation": named}).save_to_disk(tmp_path / "saved")
    assert "no class for 1 of 1 row (labels 2; first row 0)" in refused(str(tmp_path / "saved"))


# --- class names of each file


def write_files(folder: Path, classes: Mapping[str, Sequence[str] | None], suffix: str = "parquet") -> str:
    """Write one file of each name, whose rows have the class ant and which states these classes, or only numbers for None."""
    folder.mkdir(parents=True)
    for file, names in classes.items():
        kinds = features(names) if names else kinds_of(image=datasets.Image(), label=datasets.Value("int64"))
        rows = table([row(1, (names or ["ant"]).index("ant"), "a.png")], kinds)
        if suffix == "parquet":
            rows.to_parquet(folder / f"{file}.parquet")
            continue
        stored = rows.data.table.replace_schema_metadata(rows.features.arrow_schema.metadata)
        make = pa.ipc.new_stream if suffix == "stream" else pa.ipc.new_file
        with make(folder / f"{file}.arrow", stored.schema) as writer:
            writer.write_table(stored)
    return str(folder)


TWO = ("ant", "bee")


@pytest.mark.parametrize("suffix", ["parquet", "stream", "file"])
@pytest.mark.parametrize(
    ("classes", "at_fault", "text"),
    [
        (
            {"train": TWO, "test": ("bee", "ant")},
            "test",
            "Class 0 of column 'label' is 'bee' in this file, but 'ant' in",
        ),
        ({"train": TWO, "test": ("ant",)}, "test", "Class 1 of column 'label' is None in this file, but 'bee' in"),
        (
            {"train-0-of-2": ("ant",), "train-1-of-2": TWO, "test": ("ant",)},
            "train-1-of-2",
            "Class 1 of column 'label' is 'bee' in this file, but None in",
        ),
        ({"train": TWO, "test": None}, "test", "Class 0 of column 'label' is None in this file, but 'ant' in"),
        ({"train": None, "test": TWO}, "test", "Class 0 of column 'label' is 'ant' in this file, but None in"),
    ],
    ids=["other order", "class missing", "shards of one split", "no names", "names in one"],
)
def test_files_that_state_different_class_names_are_refused(
    tmp_path: Path, suffix: str, classes: Mapping[str, Sequence[str] | None], at_fault: str, text: str
) -> None:
    name = write_files(tmp_path / "d", classes, suffix)
    message = refused(name)
    end = "parquet" if suffix == "parquet" else "arrow"
    assert message.startswith(
        f"{Path(name).resolve() / at_fault}.{end}: {text} {Path(name).resolve() / next(iter(classes))}.{end}"
    )


def test_validation_split_alone_is_not_read_by_the_class_names_of_train(tmp_path: Path) -> None:
    name = write_files(tmp_path / "d", {"train": TWO, "test": ("bee", "ant")})
    with pytest.raises(DataError, match="Class 0 of column 'label' is 'bee'"):
        read_split(f"hf:{name}", "val")


def test_class_names_of_a_split_that_is_not_used_may_differ(tmp_path: Path) -> None:
    name = write_files(tmp_path / "d", {"train": TWO, "validation": TWO, "test": ("bee", "ant")})
    assert read(name).val.ids == ("ant/a.png",)


def write_readme(folder: str, names: Sequence[str]) -> None:
    listed = "".join(f"          '{number}': {name}\n" for number, name in enumerate(names))
    Path(folder, "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        f"      class_label:\n        names:\n{listed}---\n"
    )


def test_files_without_class_names_have_those_of_the_readme(tmp_path: Path) -> None:
    name = write_files(tmp_path / "d", {"train": None, "test": None})
    write_readme(name, TWO)
    assert read(name).val.ids == ("ant/a.png",)


def test_files_whose_class_names_are_not_those_of_the_readme_are_refused(tmp_path: Path) -> None:
    name = write_files(tmp_path / "d", {"train": TWO, "test": TWO})
    write_readme(name, TWO[::-1])
    assert "Class 0 of column 'label' is 'ant' in this file, but 'bee' in README.md" in refused(name)


def test_splits_that_save_to_disk_wrote_keep_class_names_of_their_own(tmp_path: Path) -> None:
    stored = {
        "train": table(pair()),
        "validation": table([row(1, 1, "a.png"), row(2, 0, "b.png")], features(TWO[::-1])),
    }
    datasets.DatasetDict(stored).save_to_disk(tmp_path / "saved")
    assert read(str(tmp_path / "saved")).val.ids == ("ant/a.png", "bee/b.png")


# --- ids


@pytest.mark.parametrize(
    ("paths", "ids"),
    [
        (("x/a.png", "b.png", "y/a.png"), ("ant/a.png", "ant/b.png", "bee/a.png")),
        (("x/a.png::/data/x.zip", "b.png", "a.png"), ("ant/a.png", "ant/b.png", "bee/a.png")),
        (("a.png", None, "x.png"), None),
        (("a.png", "folder/a.png", "x.png"), None),
        (("a.png", "b\n.png", "x.png"), None),
        (("a.png", "folder/", "x.png"), None),
    ],
    ids=["same in two classes", "archive", "missing", "twice by its last part", "line end", "no last part"],
)
def test_rows_are_names_where_paths_cannot_be(
    tmp_path: Path, paths: tuple[str | None, ...], ids: tuple[str, ...] | None
) -> None:
    rows = [row(1, label, path) for label, path in zip((0, 0, 1), paths, strict=True)]
    val = read(write(tmp_path / "d", train=rows, validation=rows)).val
    assert val.ids == (ids or ("ant/00000000.png", "ant/00000001.png", "bee/00000002.png"))


@pytest.mark.parametrize(
    ("content", "ending"),
    [
        (picture(1, "JPEG"), "jpg"),
        (picture(1, "PNG"), "png"),
        (picture(1, "WEBP"), "webp"),
        (picture(1, "BMP"), "bmp"),
        (picture(1, "GIF"), "gif"),
        (b"", "img"),
        (b"RIFF....WAVE", "img"),
    ],
)
def test_suffix_of_a_row_is_that_of_its_bytes(tmp_path: Path, content: bytes, ending: str) -> None:
    rows = [{"image": {"bytes": content, "path": None}, "label": 0}]
    assert read(write(tmp_path / "d", train=rows, validation=rows)).val.ids == (f"ant/00000000.{ending}",)


def test_row_numbers_continue_over_files_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msn_eval.data.huggingface._BATCH_ROWS", 2)
    rows = [row(number, 0) for number in range(5)]
    val = read(write(tmp_path / "d", train=rows, validation=rows)).val
    assert [(image, val.source.read(image)) for image in val.ids] == [
        (f"ant/{n:08d}.png", picture(n)) for n in range(5)
    ]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("n/a", "n_a"),
        ("two\nlines", "two_lines"),
        ("", "_"),
        (".", "_"),
        ("..", "__"),
        ("\x85", "_"),
        ("tench, tinca", None),
    ],
)
def test_class_name_becomes_one_part_of_a_path(tmp_path: Path, name: str, written: str | None) -> None:
    rows = [row(1, 0, "x.png")]
    data = read(write(tmp_path / "d", features((name,)), train=rows, validation=rows))
    assert (data.classes, data.val.ids) == ((written or name,), (f"{written or name}/x.png",))


def test_two_classes_never_become_one(tmp_path: Path) -> None:
    """Even where each stands in a split of its own."""
    kinds = kinds_of(image=datasets.Image(), label=datasets.Value("string"))
    name = write(tmp_path / "d", kinds, train=[row(1, "a/b", "x.png")], validation=[row(1, "a_b", "x.png")])
    text = refused(name)
    assert "Classes 'a/b', 'a_b' would have the same name 'a_b' in ids" in text


# --- rows without bytes


def write_paths(folder: Path, *images: tuple[bytes | None, str | None]) -> str:
    """Write Parquet files whose rows may hold paths alone; the library itself would put the files' bytes there."""
    folder.mkdir(exist_ok=True)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = pa.array([{"bytes": content, "path": path} for content, path in images], kind)
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": column, "label": ["ant"] * len(images)}), folder / f"{split}.parquet")
    return str(folder)


def test_relative_path_starts_at_the_folder(tmp_path: Path) -> None:
    (tmp_path / "d" / "files").mkdir(parents=True)
    (tmp_path / "d" / "files" / "x.png").write_bytes(picture(4))
    val = read(write_paths(tmp_path / "d", (None, "files/x.png"))).val
    assert (val.ids, val.source.read("ant/x.png")) == (("ant/x.png",), picture(4))
    assert val.source.place("ant/x.png").endswith(f"row 0: {tmp_path / 'd' / 'files' / 'x.png'}")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (None, "neither bytes nor a path are stored"),
        ("", "neither bytes nor a path are stored"),
        ("https://example.org/x.png", "only an address is stored, https://example.org/x.png"),
    ],
)
def test_row_without_an_image_is_an_error_of_its_image_alone(tmp_path: Path, path: str | None, why: str) -> None:
    val = read(write_paths(tmp_path / "d", (picture(1), "a.png"), (None, path))).val
    for image in val.ids[:-1]:
        assert val.source.read(image) == picture(1)
    with pytest.raises(OSError, match=why):
        val.source.read(val.ids[-1])


@pytest.mark.parametrize("kind", ["nothing", "a pipe"])
def test_missing_file_is_an_error_of_its_image_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    if kind == "a pipe":
        os.mkfifo(path)
    val = read(write_paths(tmp_path / "d", (None, str(path)))).val
    with pytest.raises(FileNotFoundError):
        val.source.read("ant/x.png")
    assert val.source.place("ant/x.png").endswith("split test, row 0")


def test_suffix_of_a_row_with_a_path_is_that_of_the_file(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(picture(1, "JPEG"))
    name = write_paths(tmp_path / "d", *((None, str(tmp_path / folder / "x.png")) for folder in ("a", "b")))
    assert read(name).val.ids == ("ant/00000000.jpg", "ant/00000001.jpg")


# --- the source


@pytest.fixture
def val(tmp_path: Path) -> ImageSet:
    rows = [row(number, number % 2, f"{number}.png") for number in range(40)]
    images = read(write(tmp_path / "d", train=rows[::-1], validation=rows)).val
    assert isinstance(images, ImageSet)
    return images


def contents(images: ImageSet) -> list[bytes]:
    return [picture(int(image.partition("/")[2].removesuffix(".png"))) for image in images.ids]


def test_fresh_process_reads_the_right_rows(val: ImageSet) -> None:
    """It gets the source by pickle, without the rows themselves."""
    assert len(pickle.dumps(val.source)) < 10_000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(val.source.read, val.ids) == contents(val)


def test_splits_have_roots_of_their_own(tmp_path: Path) -> None:
    """The memory of hashes goes by the root, and both splits may hold an image of the same id."""
    rows = [row(1, 0, "x.png")]
    data = read(write(tmp_path / "d", train=rows, validation=[row(2, 0, "x.png")]))
    hashes = [hash_images(images, cache_dir=tmp_path / "memory") for images in (data.train, data.val) * 2]
    expected = [{"ant/x.png": hashlib.sha256(picture(number)).hexdigest()} for number in (1, 2)]
    assert hashes == expected * 2


def test_stamps_differ_between_rows_and_start_with_the_size(val: ImageSet) -> None:
    stamps = {val.source.stamp(image) for image in val.ids}
    assert (len(stamps), {stamp[0] for stamp in stamps}) == (len(val), {len(picture(1))})


def test_stamp_of_a_row_with_a_path_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture(1))
    os.utime(tmp_path / "x.png", ns=(9, 9))
    val = read(write_paths(tmp_path / "d", (None, str(tmp_path / "x.png")))).val
    assert val.source.stamp("ant/x.png")[:2] == (len(picture(1)), 9)


# --- names, the library and its cache


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "a/..", "o/n:", "o/n@", "parquet"]
)
def test_name_that_is_neither_folder_nor_repository_is_refused(name: str) -> None:
    assert f"hf:{name}: Neither an existing folder nor OWNER/NAME" in refused(name)


@pytest.mark.parametrize("name", ["o/n", "o/n:default", "o/n@v1", "o/n:default@refs/convert/parquet"])
def test_forbidden_hub_has_a_hint_for_work_without_it(name: str, cache: Path) -> None:
    text = refused(name)
    assert text.startswith(
        f"hf:{name}: $HF_DATASETS_OFFLINE forbids to ask the hub, and the cache {cache} does not hold"
    )
    assert "`hf download --repo-type dataset o/n" in text
    assert "copy DIR here and give it: hf:DIR" in text


def test_folder_named_like_a_reader_of_the_library_is_read_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would read whatever stands in the working folder instead."""
    write(tmp_path, train=[row(1, 0, "other.png")], validation=[row(1, 0, "other.png")])
    write(tmp_path / "parquet", train=pair(), validation=pair())
    monkeypatch.chdir(tmp_path)
    assert read("parquet").val.ids == ("ant/a.png", "bee/b.png")


def test_missing_library_is_an_error_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'msn-eval[hf]'" in refused(str(tmp_path), UsageError)


def failing(error: Exception) -> Callable[..., object]:
    def load(*_: object, **__: object) -> object:
        raise RuntimeError("An error occurred while generating the dataset") from error

    return load


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR])
def test_cache_that_cannot_be_written_is_a_store_error_naming_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    error = OSError(number, os.strerror(number), "/shared/cache/x.lock")
    monkeypatch.setattr(datasets, "load_dataset_builder", failing(error))
    text = refused(str(tmp_path), StoreError)
    assert text.startswith(
        f"/shared/cache/x.lock: Cannot write the cache of the `datasets` library: {os.strerror(number)}"
    )
    assert "$HF_DATASETS_CACHE" in text


def test_closed_file_of_the_data_set_itself_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "train.parquet"))
    monkeypatch.setattr(datasets, "load_dataset_builder", failing(error))
    assert (
        refused(str(tmp_path))
        == f"{tmp_path / 'train.parquet'}: Cannot read it: Permission denied\nCheck its permissions."
    )


def test_progress_bars_are_not_drawn_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write(tmp_path / "d", train=pair(), validation=pair())
    capsys.readouterr()
    read(name)
    assert capsys.readouterr().err == ""


# --- a local hub; the library reads its address once, when it is imported


class Hub:
    """A hub with the data set `o/n` at one commit."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        outer = self
        self.asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                outer.asked.append(path)
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                code, body, headers = outer._answer(path, files)
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = answer  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @staticmethod
    def _answer(path: str, files: Mapping[str, bytes]) -> tuple[int, bytes, dict[str, str]]:
        if path.startswith("/api/datasets/o/n/tree/"):
            sizes = [{"type": "file", "path": name, "size": len(body), "oid": name} for name, body in files.items()]
            return 200, json.dumps(sizes if path.endswith(COMMIT) else []).encode(), {}
        if path in ("/api/datasets/o/n", f"/api/datasets/o/n/revision/{COMMIT}", "/api/datasets/o/n/revision/v1"):
            return 200, json.dumps({"id": "o/n", "sha": COMMIT, "siblings": [], "tags": []}).encode(), {}
        name = path.rpartition("/")[2]
        if path.startswith(f"/datasets/o/n/resolve/{COMMIT}/") and name in files:
            return 200, files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        missing = "EntryNotFound" if path.startswith("/datasets/o/n/resolve/") else "RepoNotFound"
        return 404, b"{}", {"X-Error-Code": missing, "X-Repo-Commit": COMMIT}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, dict[str, str]]]:
    """A hub, and the environment of a process that uses it."""
    home = tmp_path_factory.mktemp("hub")
    write(home / "files", train=pair(), validation=pair())
    made = Hub({file.name: file.read_bytes() for file in (home / "files").iterdir()})
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{made.http.server_port}",
        "HF_HOME": str(home / "home"),
        "no_proxy": "127.0.0.1",
    }
    yield made, environment
    made.http.shutdown()
    thread.join()
    made.http.server_close()


def read_elsewhere(environment: Mapping[str, str], *names: str) -> list[str]:
    """Read data sets in another process, and return the ids or the error of each."""
    program = (
        "import datasets, sys, time\n"
        "from msn_eval.data import read_dataset\n"
        "from msn_eval.errors import MsnEvalError\n"
        "for name in sys.argv[1:]:\n"
        "    began = time.monotonic()\n"
        "    try: output = read_dataset('hf:' + name).val.ids\n"
        "    except MsnEvalError as error: output = str(error).partition(chr(10))[0]\n"
        "    print(output, 'slow' if time.monotonic() - began > 20 else '')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, text=True, env=dict(environment), timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def outputs(hub: tuple[Hub, dict[str, str]]) -> list[str]:
    """The output of reads from the hub with an empty cache."""
    return read_elsewhere(hub[1], "o/n", "o/n@v1", "o/x", "o/n:other")


def test_data_set_of_the_hub_is_read_at_any_name_of_its_commit(outputs: list[str]) -> None:
    assert outputs[:2] == ["('ant/a.png', 'bee/b.png')"] * 2


def test_names_that_the_hub_does_not_know_are_refused(outputs: list[str]) -> None:
    assert outputs[2:] == [
        "hf:o/x: The hub refuses access (HTTP 404): there is no repository of this name, or it is gated or private",
        "hf:o/n:other: BuilderConfig 'other' not found. Available: ['default']",
    ]


@pytest.mark.usefixtures("outputs")  # they filled the cache
def test_unreachable_hub_falls_back_to_the_cache_soon(hub: tuple[Hub, dict[str, str]]) -> None:
    silent = hub[1] | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    messages = read_elsewhere(silent, "o/n", f"o/n@{COMMIT}", "o/n@v1", "o/other")
    assert messages[:2] == ["('ant/a.png', 'bee/b.png')"] * 2
    assert re.search(r"^hf:o/n@v1: the hub cannot be reached: .* does not hold this data set at v1$", messages[2])
    assert re.search(r"^hf:o/other: the hub cannot be reached: .* does not hold this data set$", messages[3])


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "MSN_EVAL_OFFLINE"])
def test_forbidden_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the hub was asked"))
    assert refused("o/n").startswith(f"hf:o/n: ${variable} forbids to ask the hub")
    assert datasets.config.HF_HUB_OFFLINE is False
