import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from msn_eval.cli import main
from msn_eval.commands.show import _choose_images, _render_page
from msn_eval.data import read_dataset
from msn_eval.features import visualization
from msn_eval.reports import pictures

_NETWORK = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2"


def _show(out: Path, *arguments: str) -> int:
    common = ["--data", "digits", "--subset", "1img@1", "--images", "2", "--limit", "2", "--device", "cpu"]
    return main(["show", "--checkpoint", _NETWORK, *common, "--out", str(out), *arguments])


def test_three_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = _show(tmp_path)

    files = {"neighbours.png", "attention.png", "classes.png"}
    assert (code, {path.name for path in tmp_path.iterdir()}) == (0, files)
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == files


def test_page_embeds_the_pictures_and_loads_nothing(tmp_path: Path) -> None:
    _show(tmp_path, "--format", "html", "--pictures", "attention,classes")

    page = (tmp_path / "show.html").read_text()
    pictures = re.findall(r'<img class="on-(light|dark)" alt="[^"]*" src="data:image/png;base64,([^"]*)"', page)
    assert re.findall(r'(?:src|href)="([^,]*),', page) == ["data:", *["data:image/png;base64"] * 4]
    assert [theme for theme, _ in pictures] == ["light", "dark"] * 2
    assert len({content for _, content in pictures}) == 4
    assert "default-src 'none'" in page


def test_classes_with_wordnet_ids_are_named_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    draw = pictures.draw_classes
    monkeypatch.setattr(pictures, "draw_classes", lambda *arguments: names.extend(arguments[2]) or draw(*arguments))
    for split in ("train", "val"):
        for number, wnid in enumerate(("n01440764", "n02084071")):
            (tmp_path / split / wnid).mkdir(parents=True)
            Image.new("RGB", (32, 32), (90 * number, 9, 9)).save(tmp_path / split / wnid / f"{split}.png")

    code = _show(tmp_path / "out", "--data", str(tmp_path), "--pictures", "classes")

    assert (code, names) == (0, ["tench", "dog"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "pixels"), "pixels (pixels) is not a plain Vision Transformer with a class token"),
        (("--masked", "0,100"), "--masked 0,100 is out of range"),
        (("--masked", "half"), "--masked half is out of range"),
        (("--pictures", "attention,class"), "--pictures: cannot be 'class'. Did you mean classes?"),
        (("--pictures", ""), "--pictures: cannot be ''."),
        (("--image", "0/0000.png"), "--image 0/0000.png is not a validation image."),
        (("--images", "0"), "--images 0 is out of range"),
    ],
)
def test_invalid_options_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _show(tmp_path, *arguments)

    assert (code, message in capsys.readouterr().err, list(tmp_path.iterdir())) == (2, True, [])


def test_data_set_is_that_of_the_environment_where_none_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["show", "--checkpoint", _NETWORK, "--device", "cpu", "--pictures", "attention", "--out", str(tmp_path)]
    monkeypatch.delenv("MSN_EVAL_DATA", raising=False)
    assert main(arguments) == 2
    assert "no data set given" in capsys.readouterr().err

    monkeypatch.setenv("MSN_EVAL_DATA", "digits")
    assert main(arguments) == 0


def test_shares_neighbours_and_images_are_those_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: dict[str, Any] = {}
    find_neighbours = visualization.find_neighbours

    def record(*arguments: Any, **options: Any) -> Any:
        requested.update(options, images=len(arguments[1]))
        return find_neighbours(*arguments, **options)

    monkeypatch.setattr(visualization, "find_neighbours", record)
    options = ["--masked", "90,25", "--neighbours", "3", "--images", "3", "--seed", "7"]
    _show(tmp_path, "--pictures", "neighbours", *options)

    assert requested == {"masked": [0.25, 0.9], "count": 3, "images": 3, "seed": 7}


def test_images_without_names_are_spread_over_the_classes() -> None:
    val = read_dataset("digits").val

    assert [image_id.split("/")[0] for image_id in _choose_images(val, None, 5).ids] == ["0", "2", "4", "6", "8"]


def test_named_images_are_shown() -> None:
    val = read_dataset("digits").val
    named = [val.ids[700], val.ids[3]]

    assert set(_choose_images(val, named, 5).ids) == set(named)


def test_names_in_a_page_are_texts() -> None:
    page = _render_page("<script>alert(1)</script>\u202e", {})

    assert "<h1><bdi>&lt;script&gt;alert(1)&lt;/script&gt;\\x202e</bdi></h1>" in page
    assert "<script>alert" not in page
