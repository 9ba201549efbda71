"""The texts of rows and cells that the report formats share: percent with one decimal, as papers print it."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import groupby

from msn_eval.errors import one_line
from msn_eval.results.data_sets import DataSetAverages
from msn_eval.results.table import MEASURES, Cell, Column, Row, Table

MISSING = "–"
FAILED, DAMAGED, REFUSED = "FAILED", "DAMAGED", "REFUSED"
UNCONVERGED = "*"
_RANK_RULE = "Checkpoints of a data set that do not differ significantly share the mean of their ranks."
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_<>\[\]|#~&!@$])")


def format_accuracy(cell: Cell) -> str:
    """Return `65.5 ± 0.4`, `63.1`, FAILED, DAMAGED or REFUSED."""
    if cell.mean is None:
        return {"damaged": DAMAGED, "refused": REFUSED}.get(cell.status, FAILED)
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
    """Return the note and the source of a row. Its name has the architecture where that tells rows apart."""
    source = f"published in {row.source}" if row.source else ""
    return ", ".join(text for text in (row.note, source) if text)


def list_headers(table: Table, columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """Return the lines above columns of one group: what a line says, and its text for each column."""
    lines = [("subset", [column.subset for column in columns])]
    lines.append(("images per class", [column.images for column in columns]))
    optional = (
        ("λ", [column.strength for column in columns]),
        ("k", [column.neighbours for column in columns]),
        ("scored on", [column.test for column in columns]),
        ("draws", [str(count_draws(table, column) or "") for column in columns]),
    )
    return lines + [(label, texts) for label, texts in optional if any(texts)]


def count_draws(table: Table, column: Column) -> int | None:
    """Return the number of draws of most cells of a column; None where no cell states one."""
    counts = Counter(
        cell.draws for row in table.rows if (cell := table.cells.get((row, column))) and cell.draws and cell.results
    )
    return max(counts, key=lambda draws: (counts[draws], draws), default=None)


def format_cell_without_draws(cell: Cell | None, draws: int | None) -> str:
    """Return `format_cell` without the number of draws where it is that of the column, `draws`."""
    if cell is None or cell.draws != draws:
        return format_cell(cell)
    return f"{format_accuracy(cell)}{format_convergence_mark(cell)}"


def split_columns(columns: Sequence[Column], widths: Sequence[int], available: int) -> Iterator[list[int]]:
    """Yield the positions of columns that stand side by side in the available width; those of a subset stay together.

    Args:
        columns: Of one group, in order.
        widths: Of each column.
        available: The width of the page without the column of names.
    """
    block: list[int] = []
    for _, run in groupby(range(len(columns)), key=lambda index: columns[index].subset):
        indices = list(run)
        if block and sum(widths[index] for index in (*block, *indices)) > available:
            yield block
            block = []
        for index in indices:
            if block and sum(widths[other] for other in (*block, index)) > available:
                yield block
                block = []
            block.append(index)
    if block:
        yield block


def explain_cells(table: Table, *, draws: str = " (number of draws)") -> tuple[str, ...]:
    """Return the lines that explain the cells, and the notices of the table.

    Args:
        draws: What follows the spread in a cell.
    """
    cells = table.cells.values()
    lines = [f"Top-1 accuracy in percent: mean ± sample standard deviation over draws{draws}."]
    if any(cell.change is not None for cell in cells):
        lines.append(
            "+ or -: difference in points to the same fits on the validation images; fewer classes are easier."
        )
    if any(cell.standing.interval for cell in cells):
        lines.append("[low, high]: 95 % interval over test images; it does not include the spread over draws.")
    if any(cell.standing.rank for cell in cells):
        lines.append("rank: within a column; checkpoints that do not differ significantly share a rank.")
        lines.append("Significance: exact paired test over images, 5 % over all pairs of a column.")
    lines += [f"{name}: {MEASURES[name]}." for name in table.measures]
    if any(cell.status == "not_converged" for cell in cells):
        lines.append(f"{UNCONVERGED} the solver did not converge.")
    if any(cell.status == "failed" for cell in cells):
        lines.append(f"{FAILED}: a draw produced no result; its record has the error.")
    if any(cell.status == "refused" for cell in cells):
        lines.append(f"{REFUSED}: the checkpoint cannot be used; its error says why.")
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
