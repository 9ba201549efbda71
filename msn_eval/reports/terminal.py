"""Tables for the terminal."""

import sys
from typing import TYPE_CHECKING

from msn_eval.errors import one_line
from msn_eval.reports.text_tables import (
    describe_averages,
    describe_row,
    describe_significance,
    explain_cells,
    format_cell,
)
from msn_eval.results.table import Cell, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

UNWRAPPED_WIDTH = 100_000


def print_table(table: Table, console: "Console | None" = None) -> None:
    """Print one table per probe and its settings, to stdout if no console is given."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    if console is None:  # lines are not wrapped when piped
        console = Console(highlight=False, width=None if sys.stdout.isatty() else UNWRAPPED_WIDTH)
    for group, columns in table.groups().items():
        # Not the title of the RichTable, which would be wrapped to the table's width.
        console.print(Text(one_line(group), style="bold"), soft_wrap=True)
        rich_table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        rich_table.add_column("checkpoint", overflow="fold")
        for column in columns:
            rich_table.add_column(Text("\n".join(map(one_line, column.lines))), justify="right")
        for row, cells in table.rows_of(columns):
            rich_table.add_row(Text(one_line(describe_row(row))), *map(_format_cell, cells))
        console.print(rich_table)
    for averages in table.averages:
        title, names, texts, explanations = describe_averages(averages)
        console.print(Text(one_line(title), style="bold"), soft_wrap=True)
        rich_table = RichTable(*names, box=box.SIMPLE_HEAD, pad_edge=False)
        for row_texts in texts:
            rich_table.add_row(*map(Text, map(one_line, row_texts)))
        console.print(rich_table)
        for line in explanations:
            console.print(Text(one_line(line), style="dim"))
    for line in explain_cells(table):
        console.print(Text(one_line(line), style="dim"))


def _format_cell(cell: Cell | None) -> "Text":
    from rich.text import Text

    accuracy, significance = format_cell(cell), describe_significance(cell)
    text = Text(accuracy, style="" if cell is None or cell.mean is not None else "red")
    return text.append(f"\n{significance}", style="dim") if significance else text
