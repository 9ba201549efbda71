from pathlib import Path

import pytest

from msn_eval.data.class_names import describe_classes


def test_wordnet_ids_have_their_first_word_without_any_file() -> None:
    names = describe_classes(["n01440764", "n02012849", "cat", "n99999999"])
    assert names == ("tench", "crane", "cat", "n99999999")


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        ("words.txt", "n01440764\tmy fish, another\nx1\tfirst\n", ("my fish", "first", "0", "1")),
        ("classes.txt", "\ufeffx1\tfirst\r\n0\tzero\r\n", ("tench", "first", "zero", "1")),
        ("classes.txt", "zero\none\n", ("tench", "x1", "zero", "one")),
        ("words.txt", "", ("tench", "x1", "0", "1")),
    ],
)
def test_file_of_the_data_set_names_its_classes(tmp_path: Path, file: str, text: str, names: tuple[str, ...]) -> None:
    (tmp_path / file).write_bytes(text.encode())
    assert describe_classes(["n01440764", "x1", "0", "1"], tmp_path) == names


def test_names_of_one_thousand_classes_of_imagenet_are_those_of_timm() -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wnids = info.label_names()
    assert describe_classes(wnids) == tuple(info.label_name_to_description(wnid).partition(",")[0] for wnid in wnids)
