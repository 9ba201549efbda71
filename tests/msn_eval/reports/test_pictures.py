from collections import defaultdict

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from msn_eval.features.extraction import Features
from msn_eval.features.visualization import Neighbours, Pixels
from msn_eval.reports.pictures import as_png, draw_attention, draw_classes, draw_neighbours
from msn_eval.reports.style import Theme, get_colour, list_curve_colours

_LEGEND = ["✓ same class", "✗ different class"]


def _pixels_of(figure: Figure) -> Pixels:
    """Return the drawn figure, (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _inside(figure: Figure, number: int, margin: int = 2) -> Pixels:
    """Return the drawn pixels inside of the frame of an axes."""
    shown = _pixels_of(figure)
    box = figure.axes[number].get_window_extent()
    top, bottom = len(shown) - round(box.y1), len(shown) - round(box.y0)
    return shown[top + margin : bottom - margin, round(box.x0) + margin : round(box.x1) - margin]


def _half(values: list[float], size: int) -> Tensor:
    """Return (1, size, size): the left half has the first value, the right half the second."""
    return torch.tensor(values).repeat_interleave(size // 2).expand(1, size, size)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_attention_covers_its_image_to_every_edge(theme: Theme) -> None:
    pixels = torch.full((1, 8, 8, 3), 200, dtype=torch.uint8)

    figure = draw_attention(torch.full((1, 1, 2, 2), 0.25), pixels, ["a"], theme)

    for number in (0, 1, 2):
        assert len(np.unique(_inside(figure, number).reshape(-1, 3), axis=0)) == 1


def test_attention_of_a_patch_is_over_the_pixels_of_the_patch() -> None:
    pixels = (_half([0.0, 255.0], 32)[..., None].expand(-1, -1, -1, 3)).to(torch.uint8)

    figure = draw_attention(_half([0.0, 1.0], 4)[:, None], pixels, ["a"])

    edges = []
    for number in (0, 2):
        bright = _inside(figure, number).sum(axis=-1)[10]
        edges.append(int(np.argmax(bright > bright.max() / 2)) / len(bright))
    assert edges == [pytest.approx(0.5, abs=1 / 60)] * 2
    assert edges[0] == edges[1]


def test_each_image_stands_beside_its_own_attention(random_pixels: Tensor) -> None:
    maps = torch.rand(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    figure = draw_attention(maps, random_pixels, ["a", "b", "c", "d"])

    drawn = [[axes.images[-1].get_array() for axes in figure.axes[row * 4 : row * 4 + 4]] for row in range(4)]
    for number, (image, complete, *heads) in enumerate(drawn):
        assert np.array_equal(image, random_pixels[number].numpy())
        assert np.allclose(complete, maps[number].mean(dim=0).numpy())
        assert all(np.allclose(head, maps[number, place].numpy()) for place, head in enumerate(heads))


def _draw_two_classes(nearest: list[list[int]]) -> Figure:
    """Draw the neighbours of an image of each of two classes, among one training image of each."""
    train = Features(
        values=torch.eye(2), labels=torch.tensor([0, 1]), image_ids=("a", "b"), n_classes=2, tap="cls-norm"
    )
    shown = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    found = Neighbours(masked=0.5, shown=shown, nearest=np.array(nearest))
    return draw_neighbours(
        [found], labels=[0, 1], train=train, train_pixels=dict(enumerate(shown)), classes=["ant", "bee"]
    )


def test_neighbours_differ_by_frame_line_and_sign_not_by_colour_alone() -> None:
    figure = _draw_two_classes([[0, 1], [0, 1]])

    looks: defaultdict[str, set[tuple[object, ...]]] = defaultdict(set)
    for number, name in enumerate(("same", "different", "different", "same")):
        axes = figure.axes[(1, 2, 4, 5)[number]]
        spine = axes.spines["top"]
        looks[name].add((spine.get_edgecolor()[:3], str(spine.get_linestyle()), axes.get_title()[0]))
    (same,), (different,) = looks["same"], looks["different"]
    assert (same[0], different[0]) == (to_rgb(get_colour("good")), to_rgb(get_colour("bad")))
    assert same[1] != different[1]
    assert (same[2], different[2]) == ("✓", "✗")


@pytest.mark.parametrize(
    ("nearest", "entries"), [([[0, 1], [0, 1]], _LEGEND), ([[0], [1]], _LEGEND[:1]), ([[1], [0]], _LEGEND[1:])]
)
def test_legend_of_neighbours_has_what_is_shown(nearest: list[list[int]], entries: list[str]) -> None:
    (legend,) = _draw_two_classes(nearest).legends

    assert [text.get_text() for text in legend.get_texts()] == entries


def _points(classes: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    labels = np.repeat(np.arange(classes), 3)
    return np.random.default_rng(0).normal(size=(len(labels), 2)), labels


def test_points_of_a_class_are_drawn_in_its_full_colour_where_they_are() -> None:
    points, labels = _points(8)

    figure = draw_classes(points, labels, [f"class {number}" for number in range(8)], 0.5)

    drawn = figure.axes[0].collections
    assert all(np.allclose(drawn[label].get_offsets(), points[labels == label]) for label in range(8))
    colours = set((_pixels_of(figure).reshape(-1, 3) @ np.array([1 << 16, 1 << 8, 1])).tolist())
    assert {int(colour[1:], 16) for colour in list_curve_colours()} <= colours


def test_class_names_are_beside_the_points() -> None:
    figure = draw_classes(*_points(10), [f"class {number}" for number in range(10)], 0.5)

    _pixels_of(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"class {number}" for number in range(10)]
    assert not figure.axes[0].texts
    assert legend.get_window_extent().x0 >= figure.axes[0].get_window_extent().x1


def test_named_classes_differ_in_colour_or_marker() -> None:
    figure = draw_classes(*_points(45), list(map(str, range(45))), 0.5)

    others, *named = figure.axes[0].collections
    looks = {(tuple(item.get_facecolor()[0]), item.get_paths()[0].vertices.tobytes()) for item in named}
    assert (len(named), len(looks)) == (40, 40)
    assert others.get_label() == figure.legends[0].get_texts()[-1].get_text() == "5 other classes"


def test_names_are_not_mathematics_and_equal_figures_give_equal_bytes() -> None:
    names = [r"$\frac{", "a_b^c", "\x1b[1m", "中", *map(str, range(6))]

    pictures = {as_png(draw_classes(*_points(10), names, 0.5)) for _ in range(2)}

    assert len(pictures) == 1
    assert pictures.pop().startswith(b"\x89PNG")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_have_the_background_of_the_pages(theme: Theme) -> None:
    shown = _pixels_of(draw_classes(*_points(2), ["a", "b"], 0.5, theme))

    assert tuple(shown[0, 0].tolist()) == tuple(bytes.fromhex(get_colour("card", theme)[1:]))
