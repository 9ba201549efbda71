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
    split_columns,
)
from msn_eval.results.folder import ResultScan
from msn_eval.results.table import Cell, Table

suffix = "md"
_MOST_COLUMNS = 6  # side by side: more do not fit into a page of GitHub


def render(table: Table, scan: ResultScan) -> str:
    """Return the table in Markdown."""
    parts = []
    for group, columns in table.groups().items():
        parts.append(f"### {markdown_text(group)}")
        rows = table.rows_of(columns)
        for block in split_columns(columns, [1] * len(columns), _MOST_COLUMNS):
            header = ["checkpoint", *(markdown_text(columns[index].title) for index in block)]
            lines = [join_markdown_cells(header), "| --- |" + " ---: |" * len(block)]
            lines += [
                join_markdown_cells(
                    [markdown_text(describe_row(row)), *(_format_cell(cells[index]) for index in block)]
                )
                for row, cells in rows
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
