"""Tables in Markdown."""

import re

from msn_eval.errors import one_line
from msn_eval.reports.texts import cell_text, legend, row_text, standing_text
from msn_eval.table import Cell, Table

_SPECIAL = re.compile(r"([\\`*_<>\[\]|#~&!@$])")


def render_markdown(table: Table) -> str:
    """Give one Markdown table for each probe and its settings."""
    parts = []
    for group, columns in table.groups().items():
        header = ["checkpoint", *(_escaped(column.title) for column in columns)]
        lines = [f"### {_escaped(group)}", "", _line(header), "| --- |" + " ---: |" * len(columns)]
        lines += [_line([_escaped(row_text(row)), *map(_cell, cells)]) for row, cells in table.rows_of(columns)]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "  \n".join(map(_escaped, legend(table)))]) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell | None) -> str:
    # Our own text: brackets around two numbers are no link.
    return " ".join(part for part in (_escaped(cell_text(cell)), standing_text(cell)) if part)


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", one_line(text))
