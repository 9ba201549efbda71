"""Tables in Markdown."""

from msn_eval.reports.markdown_text import markdown_line, markdown_text
from msn_eval.reports.text_tables import cell_text, legend, row_text, standing_text
from msn_eval.results.table import Cell, Table


def render_markdown(table: Table) -> str:
    """Give one Markdown table for each probe and its settings."""
    parts = []
    for group, columns in table.groups().items():
        header = ["checkpoint", *(markdown_text(column.title) for column in columns)]
        lines = [f"### {markdown_text(group)}", "", markdown_line(header), "| --- |" + " ---: |" * len(columns)]
        lines += [
            markdown_line([markdown_text(row_text(row)), *map(_cell, cells)]) for row, cells in table.rows_of(columns)
        ]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "  \n".join(map(markdown_text, legend(table)))]) + "\n"


def _cell(cell: Cell | None) -> str:
    # Our own text: brackets around two numbers are no link.
    return " ".join(part for part in (markdown_text(cell_text(cell)), standing_text(cell)) if part)
