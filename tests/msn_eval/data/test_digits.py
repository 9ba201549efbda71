from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from msn_eval.data import read_dataset
from msn_eval.data.dataset import DataSet


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return read_dataset("digits")


def test_first_hundred_of_each_digit_train(digits: DataSet) -> None:
    wanted = tuple(f"{digit}/{number:04d}.png" for digit in range(10) for number in range(100))
    assert digits.train.ids == wanted


def test_other_797_validate(digits: DataSet) -> None:
    counts = Counter(load_digits().target.tolist())
    wanted = tuple(f"{digit}/{number:04d}.png" for digit in range(10) for number in range(100, counts[digit]))
    assert (len(digits.val), digits.val.ids) == (797, wanted)


def test_labels_are_the_digits_of_the_ids(digits: DataSet) -> None:
    images = zip(digits.train.ids + digits.val.ids, digits.train.labels + digits.val.labels, strict=True)
    assert all(image_id[0] == digits.classes[label] == str(label) for image_id, label in images)


def test_every_pixel_is_its_value_scaled_from_sixteen_to_255(digits: DataSet) -> None:
    values, targets = load_digits(return_X_y=True)
    levels = values.astype(int).reshape(-1, 8, 8)
    rounded = (2 * 255 * levels + 16) // 32  # v * 255/16 to the nearest; its only half, 127.5, is rounded to 128
    wrong = []
    for digit in range(10):
        for number, grey in enumerate(rounded[targets == digit]):
            image_id = f"{digit}/{number:04d}.png"
            source = (digits.train if number < 100 else digits.val).source
            pixels = np.asarray(source.decode(source.read(image_id)))
            if not np.array_equal(pixels, np.repeat(grey[..., None], 3, axis=2)):
                wrong.append(image_id)
    assert wrong == []


def test_digits_are_not_files(digits: DataSet) -> None:
    assert digits.val.source.root is None
