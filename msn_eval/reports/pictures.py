"""Figures: nearest training images under masking, attention maps, and a map of the classes."""

import io
import warnings
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import printable
from msn_eval.reports.style import Theme, get_colour, list_curve_colours, style_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from msn_eval.features.extraction import Features
    from msn_eval.features.visualization import Neighbours, Pixels

_INCHES = 1.25  # of one small image
_MAP_INCHES = 7.0
_MOST_NAMES, _NAMES_A_COLUMN = 40, 32
_MARKERS = "os^DvPX"  # seven, and eight colours: 56 classes differ in marker or colour
_SAME, _DIFFERENT = ("good", "solid", "✓ same class"), ("bad", (0, (2.5, 1.5)), "✗ different class")


def draw_neighbours(
    neighbours: Sequence["Neighbours"],
    theme: Theme = "light",
    *,
    labels: Sequence[int],
    train: "Features",
    train_pixels: dict[int, "Pixels"],
    classes: Sequence[str],
) -> "Figure":
    """Draw each image with hidden patches beside its nearest training images, in solid frames if the class is the same.

    Args:
        neighbours: One entry per share of hidden patches.
        theme: Of the page that the figure is for.
        labels: Class of each image.
        train: Features of the training images.
        train_pixels: Pixels of the neighbours, by row of `train`.
        classes: Class names.
    """
    from matplotlib.patches import Patch

    count = neighbours[0].nearest.shape[1]
    legend = {}
    with style_figures(theme):
        figure, grid = _draw_grid(len(labels) * len(neighbours), count + 1)
        for number, label in enumerate(labels):
            for step, masking in enumerate(neighbours):
                query, *others = grid[number * len(neighbours) + step]
                _draw_image(query, masking.shown[number], f"{masking.masked:.0%} hidden")
                query.set_ylabel(_shorten(classes[label]), color=get_colour("ink", theme))
                for axes, row in zip(others, masking.nearest[number].tolist(), strict=True):
                    neighbour_label = int(train.labels[row])
                    colour, line, text = _SAME if neighbour_label == label else _DIFFERENT
                    _draw_image(axes, train_pixels[row], f"{text[0]} {_shorten(classes[neighbour_label])}")
                    frame: dict[str, Any] = {
                        "linewidth": 2.5,
                        "linestyle": line,
                        "edgecolor": get_colour(colour, theme),
                    }
                    for spine in axes.spines.values():
                        spine.set(**frame)
                    legend[text] = Patch(facecolor="none", label=text, **frame)
        handles = [legend[text] for *_, text in (_SAME, _DIFFERENT) if text in legend]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def draw_attention(maps: "Tensor", pixels: "Tensor", names: Sequence[str], theme: Theme = "light") -> "Figure":
    """Draw each image, the mean attention of its heads over it, and the attention of each head.

    Args:
        maps: (b, heads, rows, columns), as returned by `attention_maps`. Each map has its own colour scale.
        pixels: (b, S, S, 3) uint8.
        names: One per image.
        theme: Of the page that the figure is for.
    """
    from matplotlib.cm import ScalarMappable

    with style_figures(theme):
        figure, grid = _draw_grid(len(pixels), maps.shape[1] + 2)
        for number, (image, mean, *heads) in enumerate(grid):
            shown = pixels[number].numpy()
            size = len(shown)
            _draw_image(image, shown, "image")
            image.set_ylabel(_shorten(names[number]), color=get_colour("ink", theme))
            _draw_image(mean, shown, "all heads")
            _draw_map(mean, maps[number].mean(dim=0).numpy(), size, alpha=0.65, interpolation="bilinear")
            for head, axes in enumerate(heads):
                _draw_map(axes, maps[number, head].numpy(), size)
                _draw_image(axes, None, f"head {head + 1}")
        bar = figure.colorbar(ScalarMappable(cmap="magma"), ax=grid, location="bottom", aspect=60, pad=0.01)
        bar.set_ticks([0, 1], labels=["least", "most attention; each map has its own scale"])
        least, most = bar.ax.get_xticklabels()
        least.set_horizontalalignment("left")
        most.set_horizontalalignment("right")
        bar.ax.tick_params(length=0, colors=get_colour("soft", theme))
        bar.outline.set_visible(False)
    return figure


def draw_classes(
    points: NDArray[np.float64], labels: NDArray[np.int64], classes: Sequence[str], share: float, theme: Theme = "light"
) -> "Figure":
    """Draw the images as points, and name the classes beside them.

    Args:
        points: (n, 2), as returned by `project`.
        labels: (n,), the class of each image.
        classes: Class names.
        share: Of the variance that the two dimensions hold.
        theme: Of the page that the figure is for.
    """
    from matplotlib.figure import Figure

    present = sorted(set(labels.tolist()))
    named, others = present[:_MOST_NAMES], present[_MOST_NAMES:]
    edge = get_colour("card", theme)
    columns = -(-(len(named) + bool(others)) // _NAMES_A_COLUMN)
    with style_figures(theme):
        figure = Figure(figsize=(_MAP_INCHES + 1.7 * columns, _MAP_INCHES), layout="constrained")
        axes = figure.subplots()
        if others:
            x, y = points[np.isin(labels, others)].T
            text = f"{len(others):,} other {'class' if len(others) == 1 else 'classes'}"
            axes.scatter(x, y, s=10, color=get_colour("soft", theme), alpha=0.5, linewidths=0, label=text)
        for label, colour, marker in zip(named, cycle(list_curve_colours(theme)), cycle(_MARKERS), strict=False):
            x, y = points[labels == label].T
            axes.scatter(
                x, y, s=26, c=colour, marker=marker, edgecolors=edge, linewidths=0.4, label=_shorten(classes[label])
            )
        axes.set_title(f"First two principal components, {share:.0%} of the variance", loc="left")
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_adjustable("datalim")
        handles, texts = axes.get_legend_handles_labels()
        first = bool(others)  # which is last in the legend
        figure.legend(
            [*handles[first:], *handles[:first]],
            [*texts[first:], *texts[:first]],
            loc="outside right upper",
            ncols=columns,
            markerscale=1.4,
            handletextpad=0.2,
        )
    return figure


def as_png(figure: "Figure") -> bytes:
    """Return a figure as PNG bytes. Equal figures give equal bytes; characters that the font lacks are drawn as boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_grid(rows: int, columns: int) -> tuple["Figure", NDArray[np.object_]]:
    from matplotlib.figure import Figure

    size = (columns * _INCHES + 0.3, rows * (_INCHES + 0.18) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    cells: NDArray[np.object_] = figure.subplots(rows, columns, squeeze=False)
    return figure, cells


def _draw_image(axes: "Axes", pixels: "Pixels | None", title: str) -> None:
    if pixels is not None:
        axes.imshow(pixels, extent=(0, len(pixels), len(pixels), 0))
    axes.set_title(title, fontsize=8, pad=3)
    axes.set(xticks=[], yticks=[])


def _draw_map(axes: "Axes", values: NDArray[np.float32], size: int, **options: float | str) -> None:
    """Draw a map exactly over an image of `size` pixels: both extend from 0 to `size`."""
    axes.imshow(values, cmap="magma", extent=(0, size, size, 0), **options)  # type: ignore[arg-type]


def _shorten(name: str) -> str:
    shown = escape_math(name)
    return shown if len(shown) <= 18 else f"{shown[:17]}…"


def escape_math(name: str) -> str:
    """Escape what matplotlib would read as mathematics."""
    return printable(name).replace("$", r"\$")
