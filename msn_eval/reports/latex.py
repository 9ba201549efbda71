"""Report format `latex`, for papers: booktabs tabulars that fit the width of the text, for each probe and its settings."""

import re
from collections.abc import Iterable, Iterator, Sequence

from msn_eval.errors import one_line
from msn_eval.reports import text_tables
from msn_eval.results.data_sets import DataSetAverages
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
_HEAD = "% Needs \\usepackage{booktabs,graphicx} and \\usepackage[T1]{fontenc}"
# Scales the tabular in box 0 to the width of the text where it is wider.
_FIT = "\\ifdim\\wd0>\\linewidth\\resizebox{\\linewidth}{!}{\\usebox0}\\else\\usebox0\\fi\\par\\bigskip"
_PLAIN, _DETAILED, _MOST_CHARACTERS = 12, 18, 72  # of a column with numbers, with intervals; of all beside the names
_REPEATED = re.compile("([-,])(?=\\1)")  # LaTeX would print two in a row as one sign
_UNKNOWN = re.compile("[^\x20-\x7e\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff±λ–…]")


def render(table: Table, scan: ResultScan) -> str:
    """Return LaTeX to \\input: it needs the packages booktabs, graphicx and textcomp, in T1 (\\usepackage[T1]{fontenc}).

    A tabular that is wider than the text is scaled to its width. Names are printed and never run; letters that LaTeX's
    standard fonts lack are shown by their code points.
    """
    parts = [part for group in table.groups().items() for part in _render_group(table, *group)]
    parts += [part for averages in table.averages for part in _render_averages(averages)]
    return "\n\n".join([_HEAD, *parts, _render_notes(text_tables.explain_cells(table, draws=""))]) + "\n"


def _render_group(table: Table, group: str, columns: tuple[Column, ...]) -> Iterator[str]:
    """Yield a title and tabulars."""
    headers = text_tables.list_headers(table, columns)
    rows = table.rows_of(columns)
    cells_by_column = list(zip(*(cells for _, cells in rows), strict=True))
    has_worse = [any(cell and (cell.standing.rank or 1) > 1 for cell in cells) for cells in cells_by_column]
    draws = [text_tables.count_draws(table, column) for column in columns]
    details = [[_format_details(cell) for cell in cells] for _, cells in rows]
    yield _render_title(group)
    widths = [_DETAILED if any(texts) else _PLAIN for texts in zip(*details, strict=True)]
    for block in text_tables.split_columns(columns, widths, _MOST_CHARACTERS):
        head = [_join(map(escape_latex, [label, *(texts[index] for index in block)])) for label, texts in headers]
        lines = []
        for (row, cells), texts in zip(rows, details, strict=True):
            shown = [_format_cell(cells[index], draws[index], bold_first=has_worse[index]) for index in block]
            lines.append(_join([escape_latex(text_tables.describe_row(row)), *shown]))
            if any(texts[index] for index in block):
                lines.append(_join(["", *(texts[index] for index in block)]))
        yield _render_tabular(head, lines, len(block))


def _render_averages(averages: DataSetAverages) -> Iterator[str]:
    """Yield the title of averages over data sets, a tabular, and what explains it."""
    title, header, rows, explanations = text_tables.describe_averages(averages)
    head, *lines = (_join(map(escape_latex, texts)) for texts in (header, *rows))
    yield _render_title(title)
    yield _render_tabular([head], lines, len(header) - 1)
    yield f"{_render_notes(explanations)}\\bigskip"


def _render_title(text: str) -> str:
    return f"\\noindent\\textbf{{{escape_latex(text)}}}\\par\\nopagebreak\\smallskip"


def _render_tabular(head: Sequence[str], lines: Sequence[str], n_numbers: int) -> str:
    """Return a tabular of names and `n_numbers` columns of numbers."""
    begin = f"\\noindent\\sbox0{{\\begin{{tabular}}{{@{{}}l{'r' * n_numbers}@{{}}}}"
    return "\n".join([begin, "\\toprule", *head, "\\midrule", *lines, "\\bottomrule", f"\\end{{tabular}}}}{_FIT}"])


def _render_notes(lines: Iterable[str]) -> str:
    notes = "\\\\\n".join(map(escape_latex, lines))
    return f"\\noindent{{\\footnotesize\\raggedright\n{notes}\\par}}"


def _join(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _format_cell(cell: Cell | None, draws: int | None, *, bold_first: bool) -> str:
    """Return the accuracy; in bold if it failed, or if it has the first rank and others do not."""
    text = text_tables.format_cell_without_draws(cell, draws)
    if cell is None:
        return escape_latex(text)
    number, *std = text.split(" ± ")
    if cell.mean is None or (bold_first and cell.standing.rank == 1):
        number = f"\\textbf{{{number}}}"
    return " $\\pm$ ".join([number, *std])


def _format_details(cell: Cell | None) -> str:
    """Return interval and rank, in small print."""
    text = text_tables.describe_significance(cell)
    return f"{{\\scriptsize {escape_latex(text)}}}" if text else ""


def escape_latex(text: str) -> str:
    """Return LaTeX that prints `text` on one line."""
    known = _UNKNOWN.sub(lambda match: f"[U+{ord(match.group()):04X}]", one_line(text))
    escaped = _REPEATED.sub(r"\1{}", known.translate(str.maketrans(_ESCAPES)))
    # After the \\ of the line before, these would be its arguments.
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped
