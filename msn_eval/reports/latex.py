"""Report format `latex`, for papers: one booktabs tabular per probe and its settings."""

import re
from collections.abc import Iterable

from msn_eval.errors import one_line
from msn_eval.reports import text_tables
from msn_eval.results.folder import ResultScan
from msn_eval.results.table import Cell, Column, Table

suffix = "tex"
_ESCAPES: dict[str, str | int | None] = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "{": r"\{", "}": r"\}", "%": r"\%", "&": r"\&", "$": r"\$", "#": r"\#", "_": r"\_",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}",
    "±": r"$\pm$", "λ": r"$\lambda$", "–": r"\textendash{}", "…": r"\dots{}",
}  # fmt: skip
_REPEATED = re.compile("([-,])(?=\\1)")  # LaTeX would print two in a row as one sign
_UNKNOWN = re.compile("[^\x20-\x7e\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff±λ–…]")


def render(table: Table, scan: ResultScan) -> str:
    """Return LaTeX to \\input: it needs the packages booktabs and textcomp, in T1 (\\usepackage[T1]{fontenc}).

    Names are printed and never run; letters that LaTeX's standard fonts lack are shown by their code points.
    """
    parts = ["\n".join(_render_group(table, *group)) for group in table.groups().items()]
    notes = "\\\\\n".join(map(escape_latex, text_tables.explain_cells(table)))
    head = "% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}\n\\noindent\n"
    return head + "\n\n\\bigskip\n\\noindent\n".join([*parts, f"{{\\footnotesize\n{notes}\\par}}"]) + "\n"


def _render_group(table: Table, group: str, columns: tuple[Column, ...]) -> list[str]:
    headers = [["", *(column.subset for column in columns)]]
    headers.append(["images per class", *(column.images for column in columns)])
    if any(column.strength for column in columns):
        headers.append(["λ", *(column.strength for column in columns)])
    if any(column.test for column in columns):
        headers.append(["scored on", *(column.test for column in columns)])
    lines = [
        f"\\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}",
        "\\toprule",
        f"\\multicolumn{{{len(columns) + 1}}}{{@{{}}l@{{}}}}{{\\textbf{{{escape_latex(group)}}}}} \\\\",
        "\\midrule",
        *(_join(map(escape_latex, texts)) for texts in headers),
        "\\midrule",
    ]
    rows = table.rows_of(columns)
    columns_of_cells = zip(*(cells for _, cells in rows), strict=True)
    has_worse = [any(cell and (cell.standing.rank or 1) > 1 for cell in cells) for cells in columns_of_cells]
    for row, cells in rows:
        texts = [_format_cell(cell, bold_first=worse) for cell, worse in zip(cells, has_worse, strict=True)]
        lines.append(_join([escape_latex(text_tables.describe_row(row)), *texts]))
        details = list(map(_format_details, cells))
        if any(details):
            lines.append(_join(["", *details]))
    return [*lines, "\\bottomrule", "\\end{tabular}"]


def _join(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _format_cell(cell: Cell | None, *, bold_first: bool) -> str:
    """Return the accuracy; in bold if it failed, or if it has the first rank and others do not."""
    if cell is None:
        return escape_latex(text_tables.MISSING)
    number, *std = text_tables.format_accuracy(cell).split(" ± ")
    if cell.mean is None or (bold_first and cell.standing.rank == 1):
        number = f"\\textbf{{{number}}}"
    return " $\\pm$ ".join([number, *std]) + text_tables.format_convergence_mark(cell)


def _format_details(cell: Cell | None) -> str:
    """Return draws, interval and rank, in small print."""
    if cell is None or cell.mean is None:
        return ""
    draws = "" if cell.draws is None else f"({cell.draws})"
    text = f"{draws} {text_tables.describe_significance(cell)}".strip()
    return f"{{\\scriptsize {escape_latex(text)}}}" if text else ""


def escape_latex(text: str) -> str:
    """Return LaTeX that prints `text` on one line."""
    known = _UNKNOWN.sub(lambda match: f"[U+{ord(match.group()):04X}]", one_line(text))
    escaped = _REPEATED.sub(r"\1{}", known.translate(str.maketrans(_ESCAPES)))
    # After the \\ of the line before, these would be its arguments.
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped
