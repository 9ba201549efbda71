"""Tables for the terminal."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msn_eval.errors import one_line
from msn_eval.reports.text_tables import (
    count_draws,
    describe_averages,
    describe_details,
    describe_significance,
    explain_cells,
    format_cell_without_draws,
    list_headers,
    split_columns,
)
from msn_eval.results.table import Cell, Column, Row, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

UNWRAPPED_WIDTH = 100_000
_WIDTH = 100  # of tables where there is no terminal, unless a name is too long
_LONGEST_NAME = 40  # that is considered
_GAP = 2  # between columns: the box has one space


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
        _print_columns(table, columns, console)
    for averages in table.averages:
        title, names, texts, explanations = describe_averages(averages)
        console.print(Text(one_line(title), style="bold"), soft_wrap=True)
        rich_table = RichTable(*names, box=box.SIMPLE_HEAD, pad_edge=False)
        for row_texts in texts:
            rich_table.add_row(*map(Text, map(one_line, row_texts)))
        console.print(rich_table)
        for line in explanations:
            console.print(Text(one_line(line), style="dim"))
    for line in explain_cells(table, draws=""):
        console.print(Text(one_line(line), style="dim"))


def _print_columns(table: Table, columns: Sequence[Column], console: "Console") -> None:
    """Print the columns of a group, one below the other where they are wider than the page."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rows = [(_format_name(row), cells) for row, cells in table.rows_of(columns)]
    labels, headers = zip(*list_headers(table, columns), strict=True)
    draws = [count_draws(table, column) for column in columns]
    texts = [[_format_cell(cell, count) for cell, count in zip(cells, draws, strict=True)] for _, cells in rows]
    titles = [Text("\n".join(map(one_line, lines))) for lines in zip(*headers, strict=True)]
    widths = [_GAP + max(map(_measure, (title, *cells))) for title, *cells in zip(titles, *texts, strict=True)]
    names = Text("\n".join(labels))
    taken = min(_LONGEST_NAME, max(map(_measure, (names, *(name for name, _ in rows)))))
    width = console.width if console.is_terminal else _WIDTH
    for block in split_columns(columns, widths, width - taken):
        rich_table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, _GAP - 1, 0, 0))
        rich_table.add_column(names, overflow="fold")
        for index in block:
            rich_table.add_column(titles[index], justify="right")
        for (name, _), own in zip(rows, texts, strict=True):
            rich_table.add_row(name, *(own[index] for index in block))
        console.print(rich_table)
        console.print()


def _format_name(row: Row) -> "Text":
    """Return the name, and its details on a line of their own."""
    from rich.text import Text

    details = one_line(describe_details(row))
    return Text(one_line(row.name)).append(f"\n  {details}" if details else "", style="dim")


def _format_cell(cell: Cell | None, draws: int | None) -> "Text":
    from rich.text import Text

    accuracy, significance = format_cell_without_draws(cell, draws), describe_significance(cell)
    text = Text(accuracy, style="" if cell is None or cell.mean is not None else "red")
    return text.append(f"\n{significance}", style="dim") if significance else text


def _measure(text: "Text") -> int:
    return max(line.cell_len for line in text.split("\n", allow_blank=True))
