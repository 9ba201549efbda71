"""The texts of rows and cells that the report formats share: percent with one decimal, as papers print it."""

import re
from collections.abc import Sequence
from decimal import Decimal

from msn_eval.errors import one_line
from msn_eval.results.data_sets import DataSetAverages
from msn_eval.results.table import MEASURES, Cell, Row, Table

MISSING = "–"
FAILED, DAMAGED = "FAILED", "DAMAGED"
UNCONVERGED = "*"
_RANK_RULE = (
    "In a data set, checkpoints whose difference is not statistically significant share the mean of their ranks."
)
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
    """Return change, interval, rank and measures of a cell, `-3.1 [65.1, 65.9] rank 1 ece 0.032`, as far as known."""
    if cell is None or cell.mean is None:
        return ""
    interval, rank = cell.standing.interval, cell.standing.rank
    bounds = [] if interval is None else [f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"]
    change = [] if cell.change is None else [format_change(cell.change)]
    measures = [f"{name} {MISSING if value is None else f'{value:.3g}'}" for name, value in cell.measures.items()]
    return " ".join([*change, *bounds, *([] if rank is None else [f"rank {rank}"]), *measures])


def format_change(change: float) -> str:
    """Return the change from the validation images in points, with its sign."""
    return f"{round(100 * change, 1) + 0.0:+.1f}"  # not -0.0


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
    if any(cell.change is not None for cell in cells):
        lines.append(
            "+ or - before a number: difference to the same fits on the validation images, in points; fewer classes are easier."
        )
    if any(cell.standing.interval for cell in cells):
        lines.append("[low, high]: 95 % interval over test images; it does not include the spread over draws.")
    if any(cell.standing.rank for cell in cells):
        lines.append(
            "rank: within a column; checkpoints whose difference is not statistically significant share a rank "
            "(exact paired test, 5 % over all pairs)."
        )
    lines += [f"{name}: {MEASURES[name]}." for name in table.measures]
    if any(cell.status == "not_converged" for cell in cells):
        lines.append(f"{UNCONVERGED} the solver did not converge.")
    if any(cell.status == "failed" for cell in cells):
        lines.append(f"{FAILED}: a draw produced no result; its record has the error.")
    if any(cell.status == "damaged" for cell in cells):
        lines.append(f"{DAMAGED}: a record or its predictions are not as they were written; measure it again.")
    return (*lines, *table.notices)


def describe_averages(averages: DataSetAverages) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], list[str]]:
    """Return the title of averages over data sets, the header and the rows of their table, and explanations."""
    header = ("checkpoint", "mean top-1 %", "mean rank", *(("groups",) if averages.ties else ()))
    rows = [
        (row.name, f"{100 * row.accuracy:.1f}", f"{row.rank:.2f}", *((row.groups,) if averages.ties else ()))
        for row in averages.rows
    ]
    lines = [f"Means over {len(averages.data)} data sets: {', '.join(averages.data)}. {_RANK_RULE}"]
    if averages.p_value is None:
        lines.append("Friedman's test needs three data sets and three checkpoints.")
    else:
        lines.append(
            f"Friedman's test that all are equally good: p = {averages.p_value:.2g}. Checkpoints with a common letter do not "
            "differ significantly (all pairs, Holm's correction, 5 %)."
        )
    if averages.left_out:
        lines.append(f"Left out, as they are not measured on all of them: {', '.join(averages.left_out)}.")
    return f"{averages.title}: over data sets", header, rows, lines


def markdown_text(text: str) -> str:
    """Return `text` on one line, with everything escaped that has a meaning in Markdown or HTML."""
    return _MARKDOWN_SPECIAL.sub(r"\\\1", one_line(text))


def join_markdown_cells(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table from cells that are escaped already."""
    return "| " + " | ".join(cells) + " |"


def markdown_row(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table from plain text."""
    return join_markdown_cells(list(map(markdown_text, cells)))
