import hashlib
from fractions import Fraction
from pathlib import Path

import pytest

from msn_eval.data.folder import FolderSource
from msn_eval.data.images import ImageSet
from msn_eval.data.val_split import draw_val, read_class_folders
from msn_eval.errors import DataError


def numbered(**counts: int) -> ImageSet:
    rows = [
        (f"{name}/{number:03d}.jpg", label)
        for label, name in enumerate(sorted(counts))
        for number in range(counts[name])
    ]
    ids, labels = zip(*rows, strict=True)
    return ImageSet(ids=ids, labels=labels, classes=tuple(sorted(counts)), source=FolderSource(Path()))


@pytest.mark.parametrize(
    ("share", "counts"), [(Fraction(1, 5), (3, 2)), (Fraction(1, 2), (6, 3)), (Fraction(1, 100), (1, 1))]
)
def test_share_of_each_class_is_its_first_images_by_hash(share: Fraction, counts: tuple[int, int]) -> None:
    images = numbered(cat=11, dog=6)
    expected = {
        image_id
        for ids, count in zip(images.ids_by_class, counts, strict=True)
        for image_id in sorted(ids, key=lambda name: hashlib.sha256(f"1:{name}".encode()).hexdigest())[:count]
    }
    assert draw_val(images, share=share) == expected


def test_smaller_val_is_inside_a_larger_one() -> None:
    images = numbered(cat=11, dog=6)
    assert draw_val(images, per_class=2) < draw_val(images, per_class=5)


@pytest.mark.parametrize("share", [Fraction(1, 5), Fraction(99, 100)])
def test_class_that_would_lose_all_images_is_named_with_its_count(share: Fraction) -> None:
    with pytest.raises(DataError, match="class 'dog' has 1 image: 1 for val would leave none for train") as caught:
        draw_val(numbered(cat=200, dog=1), share=share)
    assert caught.value.exit_code == 21


@pytest.mark.parametrize("names", [["train/a/x.jpg", "val/a/x.jpg"], ["x.jpg"], ["a/x.jpg", "b/more/y.jpg"], []])
def test_folder_that_is_no_folder_of_classes_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="is not a folder of class folders"):
        read_class_folders(tmp_path)
