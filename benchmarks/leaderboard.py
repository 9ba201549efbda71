"""Build the leaderboard from its records: pages, Markdown, CSV, the two figures and the table of sources of variance.

    python benchmarks/leaderboard.py                # what `make leaderboard` runs
    python benchmarks/leaderboard.py --out FOLDER   # elsewhere, to compare with what is committed

`reports/leaderboard/README.md` states how the records were made. Networks that were trained with labels of the same
classes have a table of their own, so that they are not ranked among the others.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msn_eval.cli import main as msn_eval
from msn_eval.reports.style import get_colour, style_figures
from msn_eval.results.folder import read_results, scan_results
from msn_eval.results.leaderboard import make_leaderboard
from msn_eval.results.table import make_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

HOME = Path(__file__).parents[1] / "reports/leaderboard"
_DATA_SETS = {"cifar10": "CIFAR-10, 20,000 images", "tiny-imagenet-100": "Tiny ImageNet, 100 classes"}
GROUPS = tuple(f"{data}{group}" for data in _DATA_SETS for group in ("", "-supervised"))
_CURVES = {
    "msn": ("MSN", "s0", "o", "-"),
    "untrained": ("the same network untrained", "soft", "v", "--"),
    "pixels": ("raw pixels", "ink", "x", ":"),
}
_RUNS = {
    "msn-0": ("MSN", "s0", "o"),
    "no-masking": ("without masking", "s1", "s"),
    "no-me-max": ("without me-max", "s2", "^"),
    "simsiam": ("SimSiam", "s3", "D"),
}
_SEEDS = ("msn", "msn-seed-1")
_SUBSETS = {"1img": 1, "2imgs": 2, "5imgs": 5, "10imgs": 10}
_PROBES = ("logistic", "knn", "ridge", "linear", "ncm")


def build(out: Path) -> None:
    """Write the folders of the groups, each with a page, Markdown and CSV, the figures, and `variance.md`."""
    out.mkdir(parents=True, exist_ok=True)
    for group in GROUPS:
        code = msn_eval(
            ["report", str(HOME / "records" / group), "--format", "html,md,csv", "--ranks", "--out", str(out / group)]
        )
        if code:
            raise SystemExit(code)
        if group.endswith("-supervised"):
            _mark_supervised(out / group)
    _draw_figure(out / "label_efficiency.svg", _draw_label_efficiency)
    _draw_figure(out / "trajectories.svg", _draw_trajectories)
    (out / "variance.md").write_text("\n".join(_format_variance()) + "\n")


def _mark_supervised(folder: Path) -> None:
    """Write into a page and Markdown that the networks learned with labels of the same classes."""
    page, markdown = folder / "table.html", folder / "table.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(
        text.replace("low-shot accuracy<", "low-shot accuracy, supervised on these classes<"), encoding="utf-8"
    )
    markdown.write_text(f"Supervised on these classes\n\n{markdown.read_text(encoding='utf-8')}", encoding="utf-8")


def _draw_figure(path: Path, draw_panel: "Callable[[Axes, str], None]") -> None:
    """Write an SVG with a panel for each data set. The same records give the same bytes."""
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
            draw_panel(axes, data)
            axes.set_title(_DATA_SETS[data])
            axes.grid(axis="y")
        panels[0].set_ylabel("top-1 accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _draw_label_efficiency(axes: "Axes", data: str) -> None:
    """Draw accuracy by logistic regression over labelled images per class, with 95 % intervals over test images."""
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
    axes.set_xlabel("labelled images per class")


def _draw_trajectories(axes: "Axes", data: str) -> None:
    """Draw accuracy by logistic regression on 5 images per class over epochs, the mean of the draws."""
    for run, (label, shade, marker) in _RUNS.items():
        records = read_results(HOME / "records/trajectories" / data / run)
        if records.duplicated(["checkpoint.epoch", "split.draw"]).any():
            raise SystemExit(f"{data}/{run}: several snapshots of one epoch; keep the records of the last")
        means = 100 * records.groupby("checkpoint.epoch")["metrics.top1"].mean()
        axes.plot(means.index, means, marker=marker, color=get_colour(shade), label=label)
    records = read_results(HOME / "records" / data)
    untrained = (
        records[records["checkpoint.name"] == "untrained"]
        .groupby(["probe.name", "split.subset"])["metrics.top1"]
        .mean()
    )
    label, shade, _, line = _CURVES["untrained"]
    axes.axhline(100 * untrained["logistic", "5imgs"], linestyle=line, color=get_colour(shade), label=label)
    axes.set_xlabel("epochs")


def _format_variance() -> Iterator[str]:
    """Yield the lines of the table of sources of variance."""
    yield "# Sources of variance of one accuracy"
    yield ""
    yield "Of `msn`, in points of top-1: the mean, and the standard deviation that each source alone would cause: another draw of"
    yield "the labelled images, another seed of pre-training, the interaction of both, other test images. Estimated from two"
    yield "seeds and three draws (`benchmarks/leaderboard.py`); a seed has one degree of freedom, so 0 means too small to see."
    for data, title in _DATA_SETS.items():
        records = read_results(HOME / "records" / data)
        records = records[records["checkpoint.name"].isin(_SEEDS) & records["split.subset"].isin(_SUBSETS)]
        protocols = records.groupby(["probe.name", "split.subset"])
        yield from ("", f"## {title}", "")
        yield "| probe | images per class | mean | draw | seed | draw and seed | test images |"
        yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
        for probe, subset in product(_PROBES, _SUBSETS):
            if (probe, subset) not in protocols.groups:
                continue
            draws = protocols.get_group((probe, subset))
            top1 = draws.pivot(index="checkpoint.name", columns="split.draw", values="metrics.top1").to_numpy()
            deviations = np.sqrt(estimate_variances(top1, images=int(draws["metrics.n"].iloc[0])))
            cells = (f"{100 * value:.2f}" for value in (top1.mean(), *deviations))
            yield f"| {probe} | {_SUBSETS[subset]} | {' | '.join(cells)} |"


def estimate_variances(top1: "NDArray[np.float64]", *, images: int) -> tuple[float, float, float, float]:
    """Estimate by the moments of a two-way layout how much each source contributes to the variance of one accuracy.

    Sources: Searle, Casella and McCulloch, Variance Components (1992), chapter 4; the test images are binomial, as in
    Bouthillier et al., Accounting for variance in machine learning benchmarks (MLSys 2021). Estimates below 0 are 0.

    Args:
        top1: Accuracies as fractions, [seeds, draws].
        images: Test images behind each accuracy.

    Returns:
        Variances of draws, of seeds, of their interaction, and of test images.
    """
    seeds, draws = top1.shape
    mean = top1.mean()
    by_seed, by_draw = top1.mean(axis=1), top1.mean(axis=0)
    interaction = ((top1 - by_seed[:, None] - by_draw + mean) ** 2).sum() / ((seeds - 1) * (draws - 1))
    of_draws = max(0.0, by_draw.var(ddof=1) - interaction / seeds)
    of_seeds = max(0.0, by_seed.var(ddof=1) - interaction / draws)
    return of_draws, of_seeds, interaction, float((top1 * (1 - top1)).mean() / images)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HOME, help="default reports/leaderboard")
    build(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main()
