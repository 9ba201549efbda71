"""Tables in LaTeX, for papers: booktabs, one tabular for each probe and its settings."""

import re

from msn_eval.errors import one_line
from msn_eval.reports.text_tables import MISSING, cell_text, legend, mark, row_text, standing_text
from msn_eval.results.table import Cell, Column, Row, Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "%": r"\%",
    "&": r"\&",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "λ": r"$\lambda$",
    "–": r"\textendash{}",
    "…": r"\dots{}",
}
_TWICE = re.compile("([-,])(?=\\1)")  # two in a row would become one sign
_KNOWN = re.compile("[\x20-\x7e\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff]")  # what every font of LaTeX has


def render_latex(table: Table) -> str:
    """Give LaTeX to \\input: it needs the packages booktabs and textcomp, in T1 (\\usepackage[T1]{fontenc}).

    Whatever a name holds is printed and never run; letters that LaTeX's standard fonts lack are shown by their code points.
    """
    parts = ["\n".join(_tabular(table, group, columns)) for group, columns in table.groups().items()]
    notes = "\\\\\n".join(map(_escaped, legend(table)))
    head = "% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}\n\\noindent\n"
    return head + "\n\n\\bigskip\n\\noindent\n".join([*parts, f"{{\\footnotesize\n{notes}\\par}}"]) + "\n"


def _tabular(table: Table, group: str, columns: tuple[Column, ...]) -> list[str]:
    span = len(columns) + 1
    lines = table.rows_of(columns)
    return [
        f"\\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}",
        "\\toprule",
        f"\\multicolumn{{{span}}}{{@{{}}l@{{}}}}{{\\textbf{{{_escaped(group)}}}}} \\\\",
        "\\midrule",
        *_header(columns),
        "\\midrule",
        *(line for row, cells in lines for line in _row(row, cells, best=_leads(cells, lines))),
        "\\bottomrule",
        "\\end{tabular}",
    ]


def _header(columns: tuple[Column, ...]) -> list[str]:
    """Give a line of subsets, one of images a class, and one of lambda where some column has it."""
    stacked = {
        "": [column.subset for column in columns],
        "images a class": [column.images for column in columns],
        "λ": [column.strength for column in columns],
    }
    return [
        f"{_escaped(name)} & {' & '.join(map(_escaped, texts))} \\\\"
        for name, texts in stacked.items()
        if any(texts) or name != "λ"
    ]


def _leads(cells: list[Cell | None], lines: list[tuple[Row, list[Cell | None]]]) -> list[bool]:
    """Say which cells hold the first rank of a column where not all do."""
    return [
        cell is not None
        and cell.standing.rank == 1
        and any(other is not None and (other.standing.rank or 1) > 1 for _, row in lines for other in [row[place]])
        for place, cell in enumerate(cells)
    ]


def _row(row: Row, cells: list[Cell | None], best: list[bool]) -> list[str]:
    """Give a line of accuracies and, small beneath it, one of draws, intervals and ranks."""
    texts = [_cell(cell, leads=leads) for cell, leads in zip(cells, best, strict=True)]
    lines = [f"{_escaped(row_text(row))} & {' & '.join(texts)} \\\\"]
    asides = [_aside(cell) for cell in cells]
    if any(asides):
        lines.append(f" & {' & '.join(asides)} \\\\")
    return lines


def _cell(cell: Cell | None, *, leads: bool) -> str:
    if cell is None:
        return _escaped(MISSING)
    if cell.mean is None:
        return f"\\textbf{{{_escaped(cell_text(cell))}}}"
    number = f"{100 * cell.mean:.1f}"
    spread = "" if cell.std is None else f" $\\pm$ {100 * cell.std:.1f}"
    shown = f"\\textbf{{{number}}}" if leads else number
    return f"{shown}{spread}{mark(cell)}"


def _aside(cell: Cell | None) -> str:
    if cell is None or cell.mean is None:
        return ""
    draws = "" if cell.draws is None else f"({cell.draws})"
    small = " ".join(part for part in (draws, standing_text(cell)) if part)
    return f"{{\\scriptsize {_escaped(small)}}}" if small else ""


def _escaped(text: str) -> str:
    shown = _TWICE.sub(r"\1{}", "".join(map(_character, one_line(text))))
    # After the \\ of the line before, these would be its arguments.
    return f"{{}}{shown}" if shown.startswith(("[", "*")) else shown


def _character(one: str) -> str:
    if one in _SPECIAL:
        return _SPECIAL[one]
    return one if _KNOWN.fullmatch(one) else f"[U+{ord(one):04X}]"
