"""Tables into text. Reports are made from records alone and need no torch."""

from typing import Literal

from msn_eval.reports.latex import render_latex
from msn_eval.reports.text_tables import render_csv, render_json, render_markdown
from msn_eval.results.table import Table

__all__ = ["FORMATS", "PAGE", "SUFFIXES", "Format", "render"]

Format = Literal["md", "csv", "json", "latex"]
FORMATS: tuple[Format, ...] = ("md", "csv", "json", "latex")
SUFFIXES: dict[Format, str] = {"md": "md", "csv": "csv", "json": "json", "latex": "tex"}
PAGE = "html"  # made by html_report, which asks the records too


def render(table: Table, form: Format) -> str:
    """Give a table in one of FORMATS."""
    match form:
        case "md":
            return render_markdown(table)
        case "csv":
            return render_csv(table)
        case "json":
            return render_json(table)
        case "latex":
            return render_latex(table)
