"""Results of an evaluation as a list that shows itself: as text, data frame, figure, and in notebooks."""

import io
from collections import defaultdict
from html import escape
from typing import TYPE_CHECKING

from msn_eval.errors import one_line
from msn_eval.reports.terminal import UNWRAPPED_WIDTH, print_table
from msn_eval.reports.text_tables import describe_row, explain_cells, format_cell
from msn_eval.results.folder import make_frame
from msn_eval.results.record import Result
from msn_eval.results.table import Table, make_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class Results(list[Result]):
    """A list of results.

    `print(results.table())` shows what `msn-eval` prints, `results.frame()` has one row per result, `results.plot()` draws
    accuracy over labelled images per class. In a notebook the list is shown as tables.
    """

    def table(self) -> str:
        """Return the tables of `msn-eval report` as text."""
        from rich.console import Console

        text = io.StringIO()
        print_table(make_table(self), Console(file=text, width=UNWRAPPED_WIDTH, highlight=False, color_system=None))
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"

    def frame(self) -> "pd.DataFrame":
        """Return one row per result, with the columns of `read_results`."""
        return make_frame(self)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw mean top-1 accuracy over labelled images per class, with the standard deviation over draws.

        Args:
            ax: Where to draw; None makes a new figure of pyplot.

        Returns:
            The axes. `results.plot().figure.savefig(FILE)` writes the figure.
        """
        if ax is None:
            from matplotlib import pyplot as plt

            ax = plt.subplots(layout="constrained")[1]
        table = make_table(self)
        sizes = {column.images_per_class: column.images for column in table.columns}
        for label, points in _list_curves(table):
            images, means, spreads = zip(*points, strict=True)
            ax.errorbar(images, means, yerr=spreads, marker="o", capsize=3, label=label.replace("$", r"\$"))
        ax.set_xscale("log")
        ax.set_xticks(list(sizes), list(sizes.values()))
        ax.minorticks_off()
        ax.set(xlabel="labelled images per class", ylabel="top-1 accuracy, %")
        if ax.get_legend_handles_labels()[1]:
            ax.legend()
        return ax

    def _repr_html_(self) -> str:
        import pandas as pd

        table = make_table(self)
        parts = []
        for group, columns in table.groups().items():
            rows = [[one_line(describe_row(row)), *map(format_cell, cells)] for row, cells in table.rows_of(columns)]
            frame = pd.DataFrame(rows, columns=["checkpoint", *(one_line(column.title) for column in columns)])
            parts += [f"<p><b>{escape(one_line(group))}</b></p>", frame.to_html(index=False, border=0)]
        return "\n".join([*parts, *(f"<p>{escape(one_line(line))}</p>" for line in explain_cells(table))])


def _list_curves(table: Table) -> list[tuple[str, list[tuple[float, float, float]]]]:
    """Return label and points of each checkpoint, group and test set: images per class, mean and deviation in percent."""
    curves: defaultdict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for columns in table.groups().values():
        for row, cells in table.rows_of(columns):
            for column, cell in zip(columns, cells, strict=True):
                if cell is not None and cell.mean is not None:
                    test = f", scored on {column.test}" if column.test else ""
                    label = one_line(f"{row.name}, {column.curve}{test}")
                    curves[label].append((column.images_per_class, 100 * cell.mean, 100 * (cell.std or 0.0)))
    return [(label, sorted(points)) for label, points in curves.items()]
