"""Build the leaderboard from its records: page, Markdown, CSV and the figure of label efficiency.

    python benchmarks/leaderboard.py                # what `make leaderboard` runs
    python benchmarks/leaderboard.py --out FOLDER   # elsewhere, to compare with what is committed

`reports/leaderboard/README.md` states how the records were made. Networks that were trained with labels of the same
classes have a table of their own, so that they are not ranked among the others.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.cli import main as msn_eval
from msn_eval.reports.style import get_colour, style_figures
from msn_eval.results.folder import scan_results
from msn_eval.results.leaderboard import make_leaderboard
from msn_eval.results.table import make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOME = Path(__file__).parents[1] / "reports/leaderboard"
_DATA_SETS = {"cifar10": "CIFAR-10, 20,000 images", "tiny-imagenet-100": "Tiny ImageNet, 100 classes"}
GROUPS = tuple(f"{data}{group}" for data in _DATA_SETS for group in ("", "-supervised"))
_CURVES = {
    "msn": ("MSN", "s0", "o", "-"),
    "untrained": ("the same network untrained", "soft", "v", "--"),
    "pixels": ("raw pixels", "ink", "x", ":"),
}


def build(out: Path) -> None:
    """Write `table.html`, `table.md` and `table.csv` in a folder of each group, and `label_efficiency.svg`."""
    out.mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        code = msn_eval(
            ["report", str(HOME / "records" / group), "--format", "html,md,csv", "--ranks", "--out", str(out / group)]
        )
        if code:
            raise SystemExit(code)
    draw_label_efficiency(out / "label_efficiency.svg")


def draw_label_efficiency(path: Path) -> None:
    """Draw accuracy by logistic regression over labelled images per class, with 95 % intervals over test images."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with (
        style_figures(),
        plt.rc_context(
            {"svg.hashsalt": "msn-eval", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
        ),
    ):
        figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        for axes, data in zip(panels, _DATA_SETS, strict=True):
            _draw_panel(axes, data)
        panels[0].set_ylabel("top-1 accuracy, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_CURVES))
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _draw_panel(axes: "Axes", data: str) -> None:
    scan = scan_results([HOME / "records" / data])
    table = make_table(scan.results, standings=make_leaderboard(scan, ranked=True).standings)
    # 1 % of the labels has another lambda, so it is no point of the same curve.
    columns = [column for column in table.columns if column.probe == "logistic" and column.subset != "1pct"]
    rows = {row.name: row for row in table.rows}
    for name, (label, shade, marker, line) in _CURVES.items():
        row, colour = rows[name], get_colour(shade)
        points = [
            (column.images_per_class, 100 * cell.mean, *(100 * bound for bound in cell.standing.interval))
            for column in columns
            if (cell := table.cells.get((row, column))) and cell.mean is not None and cell.standing.interval is not None
        ]
        x, y, low, high = map(list, zip(*points, strict=True))
        axes.plot(x, y, line, marker=marker, color=colour, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    ticks = list(dict.fromkeys(column.images_per_class for column in columns))
    axes.set_xticks(ticks, [str(round(images)) for images in ticks])
    axes.minorticks_off()
    axes.set(title=_DATA_SETS[data], xlabel="labelled images per class")
    axes.grid(axis="y")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HOME, help="default reports/leaderboard")
    build(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
