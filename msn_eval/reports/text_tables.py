"""The texts of rows and cells that the report formats share: percent with one decimal, as papers print it."""

import re
from collections.abc import Sequence
from decimal import Decimal

from msn_eval.errors import one_line
from msn_eval.results.table import Cell, Row, Table

MISSING = "–"
FAILED, DAMAGED = "FAILED", "DAMAGED"
UNCONVERGED = "*"
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_<>\[\]|#~&!@$])")


def format_accuracy(cell: Cell) -> str:
    """Return `65.5 ± 0.4`, `63.1`, FAILED or DAMAGED."""
    if cell.mean is None:
        return DAMAGED if cell.status == "damaged" else FAILED
    return f"{100 * cell.mean:.1f}" + ("" if cell.std is None else f" ± {100 * cell.std:.1f}")


def format_cell(cell: Cell | None) -> str:
    """Return `65.5 ± 0.4 (3)`, `63.1 (1)`, FAILED, DAMAGED, or a dash if there is no result."""
    if cell is None:
        return MISSING
    draws = "" if cell.draws is None or cell.mean is None else f" ({cell.draws})"
    return f"{format_accuracy(cell)}{draws}{format_convergence_mark(cell)}"


def format_convergence_mark(cell: Cell) -> str:
    """Return a star if the solver stopped early, else an empty string."""
    return UNCONVERGED if cell.status == "not_converged" else ""


def describe_significance(cell: Cell | None) -> str:
    """Return the interval and the rank of a cell, `[65.1, 65.9] rank 1`, as far as they are known."""
    if cell is None or cell.mean is None:
        return ""
    interval, rank = cell.standing.interval, cell.standing.rank
    bounds = [] if interval is None else [f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"]
    return " ".join([*bounds, *([] if rank is None else [f"rank {rank}"])])


def format_exact_percent(fraction: float) -> str:
    """Return a fraction in percent with all its digits: the shortest decimal that reads back, its point moved."""
    return f"{Decimal(repr(fraction)).scaleb(2):f}"


def describe_row(row: Row) -> str:
    """Return the checkpoint's name, with its details in parentheses."""
    details = describe_details(row)
    return f"{row.name} ({details})" if details else row.name


def describe_details(row: Row) -> str:
    """Return the architecture unless the name has it, the note and the source of a row."""
    source = f"published in {row.source}" if row.source else ""
    return ", ".join(text for text in ("" if row.arch in row.name else row.arch, row.note, source) if text)


def explain_cells(table: Table) -> tuple[str, ...]:
    """Return the lines that explain the cells, and the notices of the table."""
    cells = table.cells.values()
    lines = ["Top-1 accuracy in percent: mean ± sample standard deviation over draws (number of draws)."]
    if any(cell.standing.interval for cell in cells):
        lines.append("[low, high]: 95 % interval over test images; it does not include the spread over draws.")
    if any(cell.standing.rank for cell in cells):
        lines.append(
            "rank: within a column; checkpoints whose difference is not statistically significant share a rank "
            "(exact paired test, 5 % over all pairs)."
        )
    if any(cell.status == "not_converged" for cell in cells):
        lines.append(f"{UNCONVERGED} the solver did not converge.")
    if any(cell.status == "failed" for cell in cells):
        lines.append(f"{FAILED}: a draw produced no result; its record has the error.")
    if any(cell.status == "damaged" for cell in cells):
        lines.append(f"{DAMAGED}: a record or its predictions are not as they were written; measure it again.")
    return (*lines, *table.notices)


def markdown_text(text: str) -> str:
    """Return `text` on one line, with everything escaped that has a meaning in Markdown or HTML."""
    return _MARKDOWN_SPECIAL.sub(r"\\\1", one_line(text))


def join_markdown_cells(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table from cells that are escaped already."""
    return "| " + " | ".join(cells) + " |"


def markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table from plain text."""
    return join_markdown_cells(list(map(markdown_text, cells)))
