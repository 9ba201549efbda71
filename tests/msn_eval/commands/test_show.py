import re
from pathlib import Path

import pytest

from msn_eval.cli import main

_NETWORK = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2"


def _show(out: Path, *arguments: str) -> int:
    common = ["--data", "digits", "--subset", "1img@1", "--images", "2", "--limit", "2", "--device", "cpu"]
    return main(["show", "--checkpoint", _NETWORK, *common, "--out", str(out), *arguments])


def test_three_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = _show(tmp_path)

    files = {"neighbours.png", "attention.png", "classes.png"}
    assert (code, {path.name for path in tmp_path.iterdir()}) == (0, files)
    assert {Path(line).name for line in capsys.readouterr().out.splitlines()} == files


def test_page_holds_the_pictures_and_asks_for_nothing(tmp_path: Path) -> None:
    _show(tmp_path, "--format", "html", "--pictures", "attention,classes")

    page = (tmp_path / "show.html").read_text()
    assert re.findall(r'(?:src|href)="([^,]*),', page) == ["data:", "data:image/png;base64", "data:image/png;base64"]
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "pixels"), "pixels (pixels) is no plain Vision Transformer with a class token"),
        (("--masked", "0,100"), "--masked 0,100: out of range"),
        (("--masked", "half"), "--masked half: out of range"),
        (("--pictures", "attention,class"), "--pictures class: unknown. Did you mean classes?"),
        (("--pictures", ""), "--pictures : unknown."),
        (("--image", "0/0000.png"), "--image 0/0000.png: no validation image is called so."),
        (("--images", "0"), "--images 0: out of range"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _show(tmp_path, *arguments)

    assert (code, message in capsys.readouterr().err, list(tmp_path.iterdir())) == (2, True, [])
