"""Tables for the terminal."""

from typing import TYPE_CHECKING

from msn_eval.errors import one_line
from msn_eval.reports.text_tables import FAILED, cell_text, legend, row_text, standing_text
from msn_eval.results.table import Cell, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_UNWRAPPED_WIDTH = 100_000


def print_table(table: Table, console: "Console | None" = None) -> None:
    """Print one table for each probe and its settings, to stdout where no console is given."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:  # lines are not wrapped when piped
            console = Console(highlight=False, width=_UNWRAPPED_WIDTH)
    for group, columns in table.groups().items():
        # Not the table's own title, which would be wrapped to the table's width.
        console.print(Text(one_line(group), style="bold"), soft_wrap=True)
        drawn = Drawn(box=box.SIMPLE_HEAD, pad_edge=False)
        drawn.add_column("checkpoint", overflow="fold")
        for column in columns:
            drawn.add_column(Text("\n".join(map(one_line, column.lines))), justify="right")
        for row, cells in table.rows_of(columns):
            drawn.add_row(Text(one_line(row_text(row))), *map(_drawn_cell, cells))
        console.print(drawn)
    for line in legend(table):
        console.print(Text(one_line(line), style="dim"))


def _drawn_cell(cell: Cell | None) -> "Text":
    from rich.text import Text

    text = cell_text(cell)
    drawn = Text(text, style="red" if text == FAILED else "")
    standing = standing_text(cell)
    return drawn.append(f"\n{standing}", style="dim") if standing else drawn
