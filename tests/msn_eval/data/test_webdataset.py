import gzip
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from msn_eval.data import read_dataset, read_split
from msn_eval.errors import DataError, UsageError

TarWriter = Callable[..., Path]
Members = Iterable[tuple[str, bytes]]
Write = Callable[..., str]

GOOD: Members = [("a.jpg", b"ant"), ("a.cls", b"0"), ("b.jpg", b"bee"), ("b.cls", b"1")]


@pytest.fixture
def write(tmp_path: Path, write_tar: TarWriter) -> Write:
    """Return a function that writes a WebDataset: archives by name, good ones where a split is left out."""

    def write(shards: dict[str, Members] | None = None, *, classes: str = "ant\nbee\n") -> str:
        for name, members in ({"train-000000.tar": GOOD, "val-000000.tar": GOOD} | (shards or {})).items():
            write_tar(tmp_path / name, members)
        (tmp_path / "classes.txt").write_bytes(classes.encode())
        return f"wds:{tmp_path}"

    return write


def refusal(name: str) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(name)
    assert caught.value.exit_code == 21
    assert caught.value.hint
    return str(caught.value)


def test_id_is_the_class_and_the_name_of_the_image_member(write: Write) -> None:
    train = read_split(write({"train-000000.tar": [("x/y/k.v1.jpg", b"content"), ("x/y/k.cls", b"1")]}), "train")
    assert (train.ids, train.source.read("bee/k.v1.jpg")) == (("bee/k.v1.jpg",), b"content")


def test_classes_are_numbered_by_name_and_not_by_line(write: Write) -> None:
    data = read_dataset(write(classes="zebra\nant\n"))
    assert (data.classes, data.val.ids, data.val.labels) == (("ant", "zebra"), ("ant/b.jpg", "zebra/a.jpg"), (0, 1))


def test_label_may_come_before_its_image_and_far_from_it(write: Write) -> None:
    members = [("a.cls", b"1"), ("b.jpg", b"bee"), ("b.cls", b"0"), ("a.jpg", b"ant")]
    assert read_split(write({"val-000000.tar": members}), "val").ids == ("ant/b.jpg", "bee/a.jpg")


def test_keys_in_other_folders_are_other_samples(write: Write) -> None:
    members = [("x/a.jpg", b"1"), ("x/a.cls", b"0"), ("y/a.jpg", b"2"), ("y/a.cls", b"1")]
    assert read_split(write({"val-000000.tar": members}), "val").ids == ("ant/a.jpg", "bee/a.jpg")


@pytest.mark.parametrize("text", ["\ufeffant\r\nbee\r\n", "ant\nbee", "ant\nbee\n\n\n"])
def test_classes_may_have_foreign_line_ends(write: Write, text: str) -> None:
    assert read_dataset(write(classes=text)).classes == ("ant", "bee")


@pytest.mark.parametrize("content", [b"1\n", b" 1 ", b"01", b"1\r\n"])
def test_index_may_have_a_line_end(write: Write, content: bytes) -> None:
    assert read_split(write({"val-000000.tar": [("a.jpg", b""), ("a.cls", content)]}), "val").ids == ("bee/a.jpg",)


@pytest.mark.parametrize("content", [b"", b"-1", b"1.0", b"one", b"1 2", b"\xd9\xa1", b"9" * 10, b"1".ljust(40)])
def test_index_that_is_not_a_number_is_named(write: Write, tmp_path: Path, content: bytes) -> None:
    message = refusal(write({"val-000000.tar": [("a.jpg", b""), ("a.cls", content)]}))
    assert message.startswith(f"{tmp_path / 'val-000000.tar'}: member a.cls holds ")


def test_index_beyond_the_classes_is_named(write: Write, tmp_path: Path) -> None:
    message = refusal(write({"train-000000.tar": [*GOOD, ("c.jpg", b""), ("c.cls", b"2")]}))
    assert message.startswith(
        f"{tmp_path / 'train-000000.tar'}: the class index of c.jpg is 2, but classes.txt has 2 lines"
    )


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ([("x/c.jpg", b"")], "sample x/c has no label"),
        ([("c.tga", b""), ("c.cls", b"0")], "sample c has no image"),
        ([("c.jpg", b""), ("c.mask.png", b""), ("c.cls", b"0")], "sample c has 2 images: c.jpg, c.mask.png"),
        ([("c.jpg", b""), ("c.cls", b"0"), ("c.cls", b"0")], "sample c has 2 labels: c.cls, c.cls"),
    ],
)
def test_sample_that_is_not_one_image_and_one_label_is_named(
    write: Write, tmp_path: Path, members: Members, fault: str
) -> None:
    message = refusal(write({"val-000000.tar": [*GOOD, *members]}))
    assert message.startswith(f"{tmp_path / 'val-000000.tar'}: {fault}\n")


def test_other_members_are_passed_over_and_counted(write: Write) -> None:
    odd = [("a.json", b"{}"), ("._a.jpg", b""), ("b.txt", b"caption")]
    assert read_split(write({"val-000000.tar": [*GOOD, *odd]}), "val").passed_over == 3


def test_archive_without_samples_is_not_an_error(write: Write) -> None:
    assert len(read_split(write({"train-000001.tar": []}), "train")) == 2


def test_split_without_samples_is_refused(write: Write) -> None:
    assert "the val archives hold no images" in refusal(write({"val-000000.tar": []}))


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        (["000000", "000002"], "1 archive, number 1"),
        (["000003", "000001"], "1 archive, number 2"),
        (["5"], "4 archives, number 1, 2, 3, 4"),
        (["00", "09"], "8 archives, number 1, 2, 3, 4, 5, …"),
    ],
)
def test_missing_number_among_archives_is_refused(
    write: Write, tmp_path: Path, write_tar: TarWriter, numbers: list[str], missing: str
) -> None:
    name = write()
    (tmp_path / "train-000000.tar").unlink()
    for number in numbers:
        write_tar(tmp_path / f"train-{number}.tar", GOOD)
    assert re.search(f"missing between train-.*: {missing}\n", refusal(name))


@pytest.mark.parametrize("numbers", [("000000", "000001"), ("1", "2"), ("000000-of-000002", "000001-of-000002")])
def test_numbers_count_from_zero_or_one(
    write: Write, tmp_path: Path, write_tar: TarWriter, numbers: tuple[str, str]
) -> None:
    name = write()
    (tmp_path / "train-000000.tar").unlink()
    write_tar(tmp_path / f"train-{numbers[0]}.tar", GOOD)
    write_tar(tmp_path / f"train-{numbers[1]}.tar", [("c.jpg", b""), ("c.cls", b"0")])
    assert len(read_split(name, "train")) == 3


def test_archives_need_no_numbers(write: Write, tmp_path: Path) -> None:
    name = write()
    (tmp_path / "train-000000.tar").rename(tmp_path / "train-all.tar")
    assert len(read_split(name, "train")) == 2


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_archive_among_others_is_not_a_missing_one(write: Write, tmp_path: Path, ending: str) -> None:
    name = write()
    (tmp_path / f"train-000001{ending}").write_bytes(gzip.compress(b""))
    assert refusal(name).startswith(f"{tmp_path / f'train-000001{ending}'}: is compressed")


@pytest.mark.parametrize(
    ("text", "line"), [("ant\n\nbee\n", "2: ''"), ("ant\na/b\n", "2: 'a/b'"), ("ant\n \n", "2: ' '")]
)
def test_line_that_is_not_a_class_name_is_named(write: Write, tmp_path: Path, text: str, line: str) -> None:
    assert refusal(write(classes=text)).startswith(f"{tmp_path / 'classes.txt'}: line {line} is not a class name\n")


def test_class_that_is_repeated_is_named_with_both_lines(write: Write) -> None:
    assert "classes.txt: line 3: ant is already in line 1" in refusal(write(classes="ant\nbee\nant\n"))


def test_classes_that_are_not_utf8_are_refused(write: Write, tmp_path: Path) -> None:
    name = write()
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    assert f"{tmp_path / 'classes.txt'}: cannot be read" in refusal(name)


def test_missing_classes_are_required(write: Write, tmp_path: Path) -> None:
    name = write()
    (tmp_path / "classes.txt").unlink()
    assert refusal(name).startswith(f"{tmp_path / 'classes.txt'}: cannot be read: No such file or directory\nWrite one")


def test_missing_split_is_named(write: Write, tmp_path: Path) -> None:
    name = write()
    (tmp_path / "val-000000.tar").unlink()
    assert refusal(name).startswith(f"{tmp_path}: holds no val-*.tar\n")


def test_one_split_is_read_where_the_other_is_missing(write: Write, tmp_path: Path) -> None:
    name = write()
    (tmp_path / "train-000000.tar").unlink()
    assert len(read_split(name, "val")) == 2


def test_classes_without_images_are_left_out_and_logged(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "msn_eval"):
        data = read_dataset(write(classes="ant\nbee\nyak\ncat\n"))
    assert data.classes == ("ant", "bee")
    assert "2 classes without an image left out, cat first" in caplog.text


@pytest.mark.parametrize("name", ["wds:", "hf:"])
def test_scheme_without_a_folder_is_a_usage_error(name: str) -> None:
    for read in (read_dataset, lambda name: read_split(name, "val")):
        with pytest.raises(UsageError, match=f"--data {name}: a folder or a name is missing"):
            read(name)
