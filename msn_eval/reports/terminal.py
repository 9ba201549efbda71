"""Tables for the terminal."""

from typing import TYPE_CHECKING

from msn_eval.errors import printable
from msn_eval.reports.texts import FAILED, cell_text, legend, row_text
from msn_eval.table import Table

if TYPE_CHECKING:
    from rich.console import Console

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
        drawn = Drawn(title=Text(group, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        drawn.add_column("checkpoint", overflow="fold")
        for column in columns:
            drawn.add_column(Text(column.title.replace(", ", "\n")), justify="right")
        for row in table.rows:
            cells = [table.cells.get((row, column)) for column in columns]
            if not any(cells):
                continue
            texts = [cell_text(cell) for cell in cells]
            drawn.add_row(
                Text(printable(row_text(row))), *(Text(text, style="red" if text == FAILED else "") for text in texts)
            )
        console.print(drawn)
    console.print(Text(legend(table), style="dim"))
