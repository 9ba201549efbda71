import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from msn_eval.data import imagenet_subsets as published_lists
from msn_eval.data.folder import FolderSource
from msn_eval.data.images import ImageSet
from msn_eval.data.subsets import (
    LOW_SHOT,
    check_subset_names,
    draw_subset,
    make_readable_subsets,
    make_subsets,
    read_list,
    replace_images,
)
from msn_eval.errors import DataError, NumericalError, UsageError


def image_set(files: Mapping[str, Iterable[str]]) -> ImageSet:
    """Return the images of some classes, ordered as data sets order them."""
    classes = tuple(sorted(files, key=os.fsencode))
    rows = [(f"{name}/{file}", classes.index(name)) for name in classes for file in files[name]]
    rows.sort(key=lambda row: os.fsencode(row[0]))
    ids, labels = zip(*rows, strict=True)
    return ImageSet(ids=ids, labels=labels, classes=classes, source=FolderSource(Path()))


def numbered(**counts: int) -> ImageSet:
    return image_set({name: [f"{number:03d}.jpg" for number in range(count)] for name, count in counts.items()})


def in_draw_order(draw: int, image_ids: Iterable[str]) -> list[str]:
    """Sort by the published rule: the order of SHA-256 of the bytes `DRAW:CLASS/FILE`, as hex."""
    return sorted(image_ids, key=lambda one: hashlib.sha256(f"{draw}:".encode() + os.fsencode(one)).hexdigest())


def write_list(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("draw", [1, 2, 3])
@pytest.mark.parametrize(("name", "count"), [("1img", 1), ("2imgs", 2), ("5imgs", 5)])
def test_drawn_shots_are_the_first_of_each_class_by_hash(name: str, count: int, draw: int) -> None:
    train = numbered(a=30, b=7, c=5)
    expected = {one for ids in train.ids_by_class for one in in_draw_order(draw, ids)[:count]}
    assert set(draw_subset(name, draw, train).image_ids) == expected


@pytest.mark.parametrize(("draw", "image_id"), [(1, "cat/006.jpg"), (2, "cat/002.jpg"), (3, "cat/003.jpg")])
def test_draw_of_ten_files_is_the_one_it_has_always_been(draw: int, image_id: str) -> None:
    assert draw_subset("1img", draw, numbered(cat=10)).image_ids == (image_id,)


def test_draw_hashes_the_bytes_of_names_that_are_not_utf8() -> None:
    train = image_set({"caf\udce9": [f"{number}.jpg" for number in range(20)]})
    digests = {one: hashlib.sha256(b"1:caf\xe9/" + one.partition("/")[2].encode()).digest() for one in train.ids}
    assert draw_subset("1img", 1, train).image_ids == (min(digests, key=lambda one: digests[one]),)


@pytest.mark.parametrize("draw", [1, 2, 3])
def test_one_image_is_inside_two_and_two_are_inside_five(draw: int) -> None:
    train = numbered(a=40, b=40)
    one, two, five = (set(draw_subset(name, draw, train).image_ids) for name in ("1img", "2imgs", "5imgs"))
    assert one < two < five


@pytest.mark.parametrize(
    ("images", "one_percent", "ten_percent"),
    [(1, 1, 1), (9, 1, 1), (10, 1, 1), (11, 1, 2), (99, 1, 10), (100, 1, 10), (101, 2, 11), (250, 3, 25)],
)
def test_shares_of_a_class_are_rounded_up(images: int, one_percent: int, ten_percent: int) -> None:
    train = numbered(a=images)
    assert [len(draw_subset(name, 1, train)) for name in ("1pct", "10pct")] == [one_percent, ten_percent]


@pytest.mark.parametrize("images", [1, 7, 50, 99, 100, 101])
@pytest.mark.parametrize("percent", [3, 25, 33, 99, 100])
def test_any_percentage_is_the_exact_share_rounded_up(images: int, percent: int) -> None:
    assert len(draw_subset(f"{percent}pct", 1, numbered(a=images))) == math.ceil(Fraction(images * percent, 100))


@pytest.mark.parametrize("draw", [1, 2, 3])
def test_any_number_of_images_is_the_start_of_the_order_of_its_draw(draw: int) -> None:
    train = numbered(a=40, b=30)
    order = [in_draw_order(draw, ids) for ids in train.ids_by_class]
    (made,) = make_subsets([f"17imgs@{draw}"], train)
    assert (made.name, made.rule, set(made.image_ids)) == ("17imgs", "nested", {*order[0][:17], *order[1][:17]})


@pytest.mark.parametrize("number", [5, 12])
def test_class_with_too_few_images_is_named_with_its_count(number: int) -> None:
    with pytest.raises(DataError, match=f"class 'dog' has 4 training images, {number}imgs needs {number}") as caught:
        draw_subset(f"{number}imgs", 1, numbered(cat=12, dog=4))
    assert caught.value.exit_code == 21


def test_full_is_one_draw_of_every_image() -> None:
    train = numbered(a=3, b=1)
    assert [(one.draw, one.rule, one.image_ids) for one in make_subsets(["full"], train)] == [(1, "full", train.ids)]


def test_one_draw_can_be_requested_alone() -> None:
    train = numbered(a=9)
    assert make_subsets(["5imgs@2"], train) == (draw_subset("5imgs", 2, train),)


def test_low_shot_is_every_draw_of_the_first_four() -> None:
    made = make_subsets(["low-shot"], numbered(a=9))
    assert [(one.name, one.draw) for one in made] == [(name, draw) for name in LOW_SHOT for draw in (1, 2, 3)]


def test_subset_requested_twice_is_made_once_in_the_order_requested() -> None:
    made = make_subsets(["5imgs@3", "5imgs", "1img@1", "1img@1"], numbered(a=9))
    assert [(one.name, one.draw) for one in made] == [("5imgs", 3), ("5imgs", 1), ("5imgs", 2), ("1img", 1)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("5img", r"--subset 5img: no subset and no list file has this name\. Did you mean 5imgs\?"),
        ("1imgs", r"Did you mean 1img\?"),
        ("7img", r"Did you mean 7imgs\?"),
        ("07imgs", r"Did you mean 7imgs\?"),
        ("0pct", r"Did you mean 1pct\?"),
        ("101pct", r"Did you mean 100pct\?"),
        ("0.5pct", "a whole percentage from 1 to 100\nUse 1pct, or a list file"),
        ("2.5imgs", "a whole number of images per class, or .*\nUse 2imgs, or a list file"),
        ("7imgs@4", "there is no draw '4'"),
        ("low_shot", r"Did you mean low-shot\?"),
        (
            "nowhere/list.txt",
            "Known: 1img, 2imgs, 5imgs, Nimgs, 1pct, 10pct, Npct, full, low-shot, or the path of a list",
        ),
        ("5imgs@4", "there is no draw '4'\nDraws are 1, 2 and 3"),
        ("5imgs@0", "there is no draw '0'"),
        ("5imgs@x", "there is no draw 'x'"),
        ("5imgs@01", "there is no draw '01'"),
    ],
)
def test_unknown_name_is_a_usage_error_before_anything_is_read(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_subset_names([name])
    assert caught.value.exit_code == 2


def test_second_draw_of_full_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--subset full@2: full has only draw 1 here"):
        make_subsets(["full@2"], numbered(a=2))


def test_list_takes_ids_and_file_names(tmp_path: Path) -> None:
    train = image_set({"a": ["a_1.jpg", "a_2.jpg"], "b": ["b_1.jpg"]})
    listed = read_list(write_list(tmp_path / "mine.txt", ["b/b_1.jpg", "a_2.jpg"]), train)
    assert (listed.name, listed.draw, listed.image_ids) == ("mine.txt", 1, ("a/a_2.jpg", "b/b_1.jpg"))


def test_list_with_an_at_sign_in_its_path_is_a_list(tmp_path: Path) -> None:
    path = write_list(tmp_path / "mine@home.txt", ["a/000.jpg"])
    assert make_subsets([str(path)], numbered(a=9))[0].name == "mine@home.txt"


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbfa/000.jpg\r\nb/000.jpg\r\n", b"a/000.jpg\n\n\n  b/000.jpg  \n\n", b"a/000.jpg\nb/000.jpg"],
    ids=["BOM and CRLF", "blanks", "no last line end"],
)
def test_line_ends_and_blank_lines_are_allowed_in_a_list(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    assert read_list(tmp_path / "mine.txt", numbered(a=3, b=3)).image_ids == ("a/000.jpg", "b/000.jpg")


def test_list_is_known_by_its_images_not_by_their_order(tmp_path: Path) -> None:
    train = numbered(a=3, b=3)
    first = read_list(write_list(tmp_path / "1.txt", ["a/000.jpg", "b/000.jpg"]), train)
    second = read_list(write_list(tmp_path / "2.txt", ["b/000.jpg", "a/000.jpg"]), train)
    third = read_list(write_list(tmp_path / "3.txt", ["b/000.jpg", "a/001.jpg"]), train)
    assert first.rule == second.rule != third.rule


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["a/000.jpg", "b/999.jpg"], "line 2: b/999.jpg: no such training image"),
        (["", "a/000.jpg", "", "a/000.jpg"], "line 4: a/000.jpg: already on line 2"),
        (["only.jpg", "a/only.jpg"], "line 2: a/only.jpg: already on line 1"),
        (["000.jpg"], "line 1: 000.jpg: 2 images have this file name; write CLASS/FILE"),
    ],
    ids=["unknown", "double", "double by two names", "ambiguous"],
)
def test_line_that_names_no_single_image_is_shown_with_its_number(tmp_path: Path, lines: list[str], fault: str) -> None:
    train = image_set({"a": ["000.jpg", "only.jpg"], "b": ["000.jpg"]})
    path = write_list(tmp_path / "mine.txt", lines)
    with pytest.raises(DataError) as caught:
        read_list(path, train)
    assert caught.value.exit_code == 21
    assert f"1 line does not fit the training images:\n  {fault}\n" in str(caught.value)
    assert caught.value.where == str(path)


def test_many_faulty_lines_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    path = write_list(tmp_path / "mine.txt", [f"x/{number}.jpg" for number in range(14)])
    with pytest.raises(DataError) as caught:
        read_list(path, numbered(a=1))
    text = str(caught.value)
    assert (text.count("no such training image"), "and 4 more" in text, "14 lines" in text) == (10, True, True)


def test_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the list is empty"):
        read_list(write_list(tmp_path / "mine.txt", ["", " "]), numbered(a=1))


def test_list_can_name_an_image_whose_name_is_not_utf8(tmp_path: Path) -> None:
    """As `subsets draw` writes it."""
    (tmp_path / "mine.txt").write_bytes(b"caf\xe9/x.jpg\n")
    assert read_list(tmp_path / "mine.txt", image_set({"caf\udce9": ["x.jpg"]})).image_ids == ("caf\udce9/x.jpg",)


def test_list_without_a_class_is_a_numerical_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"no image of 1 of 3 classes in this list \(b\)") as caught:
        read_list(write_list(tmp_path / "mine.txt", ["a/000.jpg", "c/000.jpg"]), numbered(a=1, b=1, c=1))
    assert caught.value.exit_code == 23


def test_bad_images_are_replaced_by_the_next_of_the_draws_order() -> None:
    train = numbered(a=9, b=9)
    order = in_draw_order(2, train.ids_by_class[0])
    drawn = draw_subset("2imgs", 2, train)
    repaired = replace_images(drawn, train, {order[0], order[2]})
    assert set(repaired.image_ids) == {order[1], order[3], *in_draw_order(2, train.ids_by_class[1])[:2]}


def test_draws_with_replaced_images_are_still_nested() -> None:
    train = numbered(a=20, b=20)
    bad = set(draw_subset("2imgs", 1, train).image_ids)
    draws = [draw_subset(name, 1, train) for name in ("1img", "2imgs", "5imgs")]
    one, two, five = (set(repaired.image_ids) for repaired in (replace_images(draw, train, bad) for draw in draws))
    assert one < two < five
    assert (len(one), len(two), len(five), five & bad) == (2, 4, 10, set())


def test_class_without_enough_readable_images_is_named() -> None:
    train = numbered(a=9, b=3)
    with pytest.raises(DataError, match="class 'b' has too few readable images for 2imgs") as caught:
        replace_images(draw_subset("2imgs", 1, train), train, {"b/000.jpg", "b/001.jpg"})
    assert caught.value.exit_code == 21


def test_list_only_loses_its_bad_images(tmp_path: Path) -> None:
    train = numbered(a=9)
    listed = read_list(write_list(tmp_path / "mine.txt", ["a/000.jpg", "a/001.jpg"]), train)
    assert replace_images(listed, train, {"a/000.jpg"}).image_ids == ("a/001.jpg",)


def test_full_only_loses_its_bad_images() -> None:
    train = numbered(a=3)
    assert replace_images(draw_subset("full", 1, train), train, {"a/001.jpg"}).image_ids == train.ids[::2]


def test_subset_of_bad_images_alone_is_refused() -> None:
    train = numbered(a=2)
    with pytest.raises(DataError, match="no image of subset full can be read"):
        replace_images(draw_subset("full", 1, train), train, set(train.ids))


@pytest.fixture(scope="module")
def imagenet_names(shared_data: Path) -> ImageSet:
    """Return a training set of ImageNet's classes that holds exactly the images that the published lists name."""
    names = {line for path in (shared_data / "imagenet_subsets").rglob("*.txt") for line in path.read_text().split()}
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.partition("_")[0], []).append(name)
    return image_set(files)


@pytest.fixture
def published(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide the published lists in the named folder only."""
    monkeypatch.setenv("MSN_EVAL_LISTS", str(shared_data / "imagenet_subsets"))
    monkeypatch.setattr(published_lists, "find_user_list_folder", lambda: tmp_path / "nobody")


@pytest.mark.usefixtures("published")
def test_imagenet_gets_the_published_draws(imagenet_names: ImageSet) -> None:
    made = make_subsets(["low-shot"], imagenet_names)
    assert [(one.name, one.draw, one.rule, len(one)) for one in made] == [
        *(("1img", draw, "published", 1_000) for draw in (1, 2, 3)),
        *(("2imgs", draw, "published", 2_000) for draw in (1, 2, 3)),
        *(("5imgs", draw, "published", 5_000) for draw in (1, 2, 3)),
        ("1pct", 1, "published", 12_811),
    ]
    assert sum(len(one) for one in made) == 36_811
    assert len({image_id for one in made for image_id in one.image_ids}) == 21_635


@pytest.mark.usefixtures("published")
def test_published_draw_holds_the_names_of_its_list(imagenet_names: ImageSet, shared_data: Path) -> None:
    (third,) = make_subsets(["5imgs@3"], imagenet_names)
    lines = (shared_data / "imagenet_subsets" / "imagenet_subsets3" / "3imgs_class.txt").read_text().split()
    assert {image_id.partition("/")[2] for image_id in third.image_ids} == set(lines)


@pytest.mark.usefixtures("published")
def test_sizes_of_imagenet_without_a_published_list_are_drawn(imagenet_names: ImageSet) -> None:
    made = make_subsets(["10pct", "3imgs"], imagenet_names)
    assert [(one.draw, one.rule) for one in made] == [(1, "nested"), (2, "nested"), (3, "nested")] * 2


@pytest.mark.usefixtures("published")
def test_bad_image_of_a_published_list_is_replaced_by_the_first_spare_one(imagenet_names: ImageSet) -> None:
    (one,) = make_subsets(["1img@1"], imagenet_names)
    bad = one.image_ids[17]
    spare = in_draw_order(1, set(imagenet_names.ids_by_class[17]) - {bad})
    repaired = replace_images(one, imagenet_names, {bad})
    assert set(repaired.image_ids) == set(one.image_ids) - {bad} | {spare[0]}


@pytest.mark.usefixtures("published")
def test_imagenet_without_a_listed_image_names_it(imagenet_names: ImageSet) -> None:
    (one,) = make_subsets(["1img@1"], imagenet_names)
    lost = one.image_ids[0]
    with pytest.raises(DataError, match=f"{lost.partition('/')[2]}: no such training image"):
        make_subsets(["1img@1"], imagenet_names.only([each for each in imagenet_names.ids if each != lost]))


@pytest.mark.usefixtures("published")
def test_other_classes_than_imagenets_are_drawn(imagenet_names: ImageSet) -> None:
    files = {
        name: [one.partition("/")[2] for one in ids]
        for name, ids in zip(imagenet_names.classes[:-1], imagenet_names.ids_by_class, strict=False)
    }
    assert {one.rule for one in make_subsets(["5imgs"], image_set(files))} == {"nested"}


def test_imagenet_without_its_lists_is_an_error_and_no_other_draw(
    imagenet_names: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_lists, "list_folders", lambda: (tmp_path,))
    with pytest.raises(DataError, match="the published list 5imgs@1") as caught:
        make_subsets(["5imgs"], imagenet_names)
    assert caught.value.exit_code == 21


def test_skipped_images_of_a_subset_do_not_depend_on_the_requested_draw() -> None:
    train = numbered(a=30, b=30)
    bad = {draw_subset("2imgs", draw, train).image_ids[0] for draw in (1, 2, 3)}

    def undecodable(images: ImageSet) -> set[str]:
        return bad & set(images.ids)

    together = make_readable_subsets(["2imgs"], train, undecodable)
    alone = make_readable_subsets(["2imgs@2"], train, undecodable)

    assert alone == together[1:2]
    assert {subset.skipped for subset in together} == {tuple(sorted(bad))}
    assert all(bad.isdisjoint(subset.image_ids) for subset in together)
