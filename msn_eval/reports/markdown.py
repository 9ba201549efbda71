"""Tables in Markdown."""

import re

from msn_eval.errors import printable
from msn_eval.reports.texts import cell_text, legend, row_text
from msn_eval.table import Table

_SPECIAL = re.compile(r"([\\`*_<>\[\]|#~])")


def render_markdown(table: Table) -> str:
    """Give one Markdown table for each probe and its settings."""
    parts = []
    for group, columns in table.groups().items():
        header = ["checkpoint", *(column.title for column in columns)]
        lines = [f"### {_escaped(group)}", "", _line(header), "| --- |" + " ---: |" * len(columns)]
        for row in table.rows:
            cells = [table.cells.get((row, column)) for column in columns]
            if any(cells):
                lines.append(_line([row_text(row), *map(cell_text, cells)]))
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, legend(table)]) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))
