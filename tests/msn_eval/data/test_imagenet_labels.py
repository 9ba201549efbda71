import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from msn_eval.data.imagenet_labels import read_labels
from msn_eval.errors import DataError

Store = Callable[..., str]

FILES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 2)]
FISH, SHARK, CRANE = "n01440764", "n01443537", "n02012849"
SYNSETS = "imagenet_2012_validation_synset_labels.txt"


def labels_in(folder: Path, files: list[str] = FILES, known: list[str] | None = None) -> list[str]:
    return read_labels(files, [folder], where="VAL", known=known)


def write_devkit(
    folder: Path, truth: str, ids: Sequence[tuple[int, str]] = ((1, CRANE), (2, FISH), (3, SHARK))
) -> Path:
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    table = np.array(list(ids), dtype=[("ILSVRC2012_ID", object), ("WNID", object)]).reshape(-1, 1)
    savemat(data / "meta.mat", {"synsets": table})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    return data


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


Write = Callable[[str, str], Path]


def refusal(folder: Path, files: list[str] = FILES, known: list[str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        labels_in(folder, files, known)
    assert caught.value.exit_code == 21
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("text", ["\ufeff{0}\r\n{1}\r\n{2}\r\n", "{0}\n{1}\n{2}", "\n{0} \n\n{1}\n{2}\n\n"])
def test_synset_file_may_have_foreign_line_ends(tmp_path: Path, write: Write, text: str) -> None:
    write(SYNSETS, text.format(FISH, SHARK, CRANE))
    assert labels_in(tmp_path) == [CRANE, FISH, SHARK]


@pytest.mark.parametrize("name", ["{}", "val/{}", "ILSVRC/Data/CLS-LOC/val/{}"])
def test_named_labels_need_no_order(tmp_path: Path, write: Write, name: str) -> None:
    lines = zip(FILES, (CRANE, FISH, SHARK), strict=True)
    write("val.txt", "".join(f"{name.format(file)} {wnid}\n" for file, wnid in lines))
    assert labels_in(tmp_path) == [CRANE, FISH, SHARK]


def test_image_that_named_labels_lack_is_refused(tmp_path: Path, write: Write) -> None:
    path = write("val.txt", f"{FILES[0]} {FISH}\n")
    assert refusal(tmp_path).startswith(f"{path}: names no class for 2 of the 3 images in VAL, {FILES[1]} first\n")


def test_kaggle_boxes_give_their_one_class(tmp_path: Path, write: Write) -> None:
    rows = [
        f"ILSVRC2012_val_0000000{n},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for n, wnid in ((2, SHARK), (1, FISH), (3, CRANE))
    ]
    write("LOC_val_solution.csv", "ImageId,PredictionString\r\n" + "\r\n".join(rows) + "\r\n")
    assert labels_in(tmp_path) == [CRANE, FISH, SHARK]


@pytest.mark.parametrize("row", [f"x,{FISH} 1 2 3 4 {SHARK} 1 2 3 4", "x", "x,", "x,1 2 3 4", "x,fish 1 2 3 4"])
def test_kaggle_line_without_one_class_is_named(tmp_path: Path, write: Write, row: str) -> None:
    path = write("LOC_val_solution.csv", f"ImageId,PredictionString\ny,{FISH} 1 2 3 4\n{row}\n")
    assert refusal(tmp_path).startswith(f"{path}: line 3: ")


def test_devkit_folder_may_be_the_data_folder_itself(tmp_path: Path) -> None:
    write_devkit(tmp_path, "2\n3\n1\n")
    (tmp_path / "ILSVRC2012_devkit_t12" / "data").rename(tmp_path / "data")
    assert labels_in(tmp_path) == [CRANE, FISH, SHARK]


@pytest.mark.parametrize("text", ["4", "0", "-1", "one", "1.0"])
def test_number_that_the_devkit_does_not_know_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    data = write_devkit(tmp_path, f"2\n{text}\n1\n")
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    assert refusal(tmp_path).startswith(
        f"{truth}: line 2: '{text}': it is not an ILSVRC2012_ID of {data / 'meta.mat'}\n"
    )


@pytest.mark.parametrize("ids", [[(1, "goldfish")], [(1, FISH), (1, SHARK)]], ids=["not a WNID", "number twice"])
def test_devkit_with_a_wrong_table_is_refused(tmp_path: Path, ids: list[tuple[int, str]]) -> None:
    data = write_devkit(tmp_path, "1\n1\n1\n", ids)
    assert f"{data / 'meta.mat'}: holds no table of classes: an ILSVRC2012_ID is not unique" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x" * 300, b"\0" * 300])
def test_damaged_table_of_classes_is_named(tmp_path: Path, content: bytes) -> None:
    data = write_devkit(tmp_path, "1\n1\n1\n")
    (data / "meta.mat").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{data / 'meta.mat'}: holds no table of classes: ")


def test_packed_devkit_that_is_cut_short_is_named(tmp_path: Path, store_pictures: Store) -> None:
    store_pictures(tmp_path, labels="packed devkit")
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(tmp_path).startswith(f"{path}: the devkit cannot be read: ")


def test_packed_devkit_without_its_files_says_which(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("ILSVRC2012_devkit_t12/readme.txt"), io.BytesIO())
    assert "holds no meta.mat and no ILSVRC2012_validation_ground_truth.txt" in refusal(tmp_path)


def test_no_labels_at_all_says_what_to_put_where(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert message.startswith("VAL: holds 3 images without class folders, and no file with their classes was found\n")
    for needed in ("ILSVRC2012_devkit_t12.tar.gz", SYNSETS, "LOC_val_solution.csv", "a folder of its own"):
        assert needed in message


@pytest.mark.parametrize("count", [2, 4])
def test_other_number_of_labels_than_images_is_refused(tmp_path: Path, write: Write, count: int) -> None:
    path = write(SYNSETS, f"{FISH}\n" * count)
    assert refusal(tmp_path).startswith(f"{path}: holds {count} labels, but there are 3 images in VAL\n")


def test_missing_image_among_as_many_strays_is_noticed(tmp_path: Path, write: Write) -> None:
    """Three labels and three images, yet the third label is not the fourth image's."""
    write(SYNSETS, f"{FISH}\n{SHARK}\n{CRANE}\n")
    message = refusal(tmp_path, [FILES[1], FILES[2], "ILSVRC2012_val_00000004.JPEG"])
    assert (
        "VAL: image 3 in order is ILSVRC2012_val_00000004.JPEG: another one is missing, and labels would shift"
        in message
    )


@pytest.mark.parametrize("text", ["n0144076", "n014407644", "N01440764", f"{FISH} {FISH} {FISH}", f"a.JPEG {FISH}"])
def test_line_without_a_class_name_is_named(tmp_path: Path, write: Write, text: str) -> None:
    path = write(SYNSETS, f"{FISH}\n{text}\n{FISH}\n")
    assert refusal(tmp_path).startswith(f"{path}: line 2: ")


def test_image_named_twice_is_refused_with_both_lines(tmp_path: Path, write: Write) -> None:
    path = write("val.txt", f"{FILES[0]} {FISH}\n{FILES[1]} {FISH}\nval/{FILES[0]} {SHARK}\n")
    assert refusal(tmp_path).startswith(f"{path}: line 3: {FILES[0][:-5]!r}: it is already in line 1\n")


def test_unknown_class_is_named_with_its_line(tmp_path: Path, write: Write) -> None:
    path = write(SYNSETS, f"{FISH}\n{SHARK}\n{CRANE}\n")
    message = refusal(tmp_path, known=[FISH, CRANE])
    assert message.startswith(
        f"{path}: line 2: {SHARK}, the class of {FILES[2]}, is not one of the 2 training classes\n"
    )


def test_numbers_without_an_order_of_classes_count_as_no_labels(tmp_path: Path, write: Write) -> None:
    write("val.txt", "".join(f"{file} {number}\n" for number, file in enumerate(FILES)))
    assert "no file with their classes was found" in refusal(tmp_path)


def test_label_files_that_differ_are_both_named(tmp_path: Path, write: Write) -> None:
    one = write(SYNSETS, f"{FISH}\n{SHARK}\n{CRANE}\n")
    data = write_devkit(tmp_path, "2\n2\n2\n")
    assert refusal(tmp_path).startswith(
        f"{one}: has {CRANE} in line 3 for {FILES[0]}, where {data / 'ILSVRC2012_validation_ground_truth.txt'} has "
        f"{FISH} in line 3; they differ on 2 of 3 images\n"
    )


def test_label_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / SYNSETS).write_bytes(b"\xff\xfe\x00")
    assert f"{tmp_path / SYNSETS}: is not UTF-8 text" in refusal(tmp_path)
