"""Report format `md`: one Markdown table per probe and its settings."""

from msn_eval.reports.text_tables import (
    describe_averages,
    describe_row,
    describe_significance,
    explain_cells,
    format_cell,
    join_markdown_cells,
    markdown_row,
    markdown_text,
)
from msn_eval.results.folder import ResultScan
from msn_eval.results.table import Cell, Table

suffix = "md"


def render(table: Table, scan: ResultScan) -> str:
    """Return the table in Markdown."""
    parts = []
    for group, columns in table.groups().items():
        header = ["checkpoint", *(markdown_text(column.title) for column in columns)]
        lines = [f"### {markdown_text(group)}", "", join_markdown_cells(header), "| --- |" + " ---: |" * len(columns)]
        lines += [
            join_markdown_cells([markdown_text(describe_row(row)), *map(_format_cell, cells)])
            for row, cells in table.rows_of(columns)
        ]
        parts.append("\n".join(lines))
    for averages in table.averages:
        title, names, texts, explanations = describe_averages(averages)
        lines = [
            f"### {markdown_text(title)}",
            "",
            join_markdown_cells(names),
            "| --- |" + " ---: |" * (len(names) - 1),
        ]
        parts += ["\n".join([*lines, *map(markdown_row, texts)]), "  \n".join(map(markdown_text, explanations))]
    return "\n\n".join([*parts, "  \n".join(map(markdown_text, explain_cells(table)))]) + "\n"


def _format_cell(cell: Cell | None) -> str:
    # The brackets of an interval are not escaped: around two numbers they are not a link.
    return " ".join([markdown_text(format_cell(cell)), describe_significance(cell)]).rstrip()
