from pathlib import Path

import pytest

from msn_eval.data import read_dataset, read_split
from msn_eval.data.csv_list import write_csv
from msn_eval.data.hashing import hash_images
from msn_eval.errors import DataError

ROWS = ["images/1.jpg,cat,train", "images/2.jpg,dog,train", "images/3.jpg,cat,val", "images/4.jpg,dog,val"]


def write_table(folder: Path, rows: list[str], header: str = "image,label,split") -> str:
    (folder / "pets.csv").write_text("\n".join([header, *rows]))
    return f"csv:{folder / 'pets.csv'}"


def test_paths_start_at_the_folder_of_the_file_and_classes_are_shared(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "3.jpg").write_bytes(b"three")
    data = read_dataset(write_table(tmp_path, ROWS))
    assert (data.name, data.classes, data.train.ids) == ("pets", ("cat", "dog"), ("cat/1.jpg", "dog/2.jpg"))
    assert data.val.source.read("cat/3.jpg") == b"three"


def test_absolute_path_and_folders_below_the_class_are_kept(tmp_path: Path) -> None:
    rows = [f"{tmp_path}/cat/1.jpg,cat,train", "x/dog/more/2.jpg,dog,train"]
    assert read_split(write_table(tmp_path, rows), "train").ids == ("cat/1.jpg", "dog/more/2.jpg")


@pytest.mark.parametrize(
    ("others", "chosen"), [(["test", "valid"], "valid"), (["test"], "test"), (["val", "test"], "val")]
)
def test_first_split_of_val_counts_and_is_named(tmp_path: Path, others: list[str], chosen: str) -> None:
    rows = [*ROWS[:2], *(f"{split}.jpg,{label},{split}" for split in others for label in ("cat",))]
    data = read_dataset(write_table(tmp_path, rows), allow_class_mismatch=True)
    assert data.val.ids == (f"cat/{chosen}.jpg",)
    assert data.name == ("pets" if chosen == "val" else f"pets ({chosen})")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("5.jpg,cat", "line 6: 2 fields instead of 3"),
        ("5.jpg", "line 6: 1 field instead of 3"),
        ("a, b.jpg,cat,train", "line 6: 4 fields instead of 3; a path with a comma needs quotes"),
        ("5.jpg,cat,holdout", "line 6: the split 'holdout' is none of train, val, valid, validation, test"),
        ("5.jpg,,train", "line 6: '' is not the name of a class"),
        ("5.jpg,cat/tom,train", "line 6: 'cat/tom' is not the name of a class"),
        ("5.jpg,..,train", "line 6: '..' is not the name of a class"),
        (",cat,train", "line 6: '' is not the path of an image"),
        ("images/1.jpg,cat,train", "line 6: images/1.jpg is already in line 2"),
        ("images/1.jpg,dog,val", "line 6: images/1.jpg is already in line 2"),
        ("more/1.jpg,cat,train", "line 6: the id cat/1.jpg is already that of line 2"),
        ('"5.jpg"x,cat,train', "line 6: "),
        ('"5.jpg,cat,train', "line 6: "),
        ('"two\nlines.jpg",cat,train\n5.jpg,cat', "line 8: 2 fields"),
    ],
)
def test_bad_row_is_refused_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(write_table(tmp_path, [*ROWS, row]))
    assert caught.value.exit_code == 21
    assert str(caught.value).startswith(f"{tmp_path / 'pets.csv'}: {message}")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image;label;split", "line 1: no column is called image (image;label;split)"),
        ("image,class,split", "line 1: no column is called label (image, class, split)"),
        ("image,label,split,split", "line 1: two columns are called split"),
    ],
)
def test_header_without_the_columns_is_refused(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(write_table(tmp_path, ROWS, header))
    assert message in str(caught.value)


@pytest.mark.parametrize("rows", [[], ROWS[:2], ROWS[2:]])
def test_file_without_rows_of_a_split_is_refused(tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(DataError, match="has no rows of the split"):
        read_dataset(write_table(tmp_path, rows))


def test_missing_image_is_reported_with_its_line(tmp_path: Path) -> None:
    val = read_dataset(write_table(tmp_path, ROWS)).val
    with pytest.raises(DataError, match=r"pets\.csv, line 4: images/3\.jpg: No such file"):
        hash_images(val, cache_dir=None)


def test_written_table_is_read_again(tmp_path: Path) -> None:
    rows = [("a, b.jpg", "cat", "train"), (' "c".jpg', "cat ", "train"), ("caf\udce9.jpg", "dog", "train")]
    write_csv(tmp_path / "pets.csv", rows)
    expected = ('cat / "c".jpg', "cat/a, b.jpg", "dog/caf\udce9.jpg")
    assert read_split(f"csv:{tmp_path / 'pets.csv'}", "train").ids == expected


def test_file_that_does_not_exist_is_reported_with_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pets\.csv: cannot be read: No such file") as caught:
        read_dataset(f"csv:{tmp_path / 'pets.csv'}")

    assert caught.value.hint.startswith("Check the path. The first line is `image,label,split`")
