"""The texts of rows and cells that every printed form shares: percent with one decimal, as papers print it."""

from decimal import Decimal

from msn_eval.results.table import Cell, Row, Table

MISSING = "–"
FAILED = "FAILED"
UNCONVERGED = "*"


def cell_text(cell: Cell | None) -> str:
    """Give `65.5 ± 0.4 (3)`, `63.1 (1)`, FAILED, or a dash where there is no result."""
    if cell is None:
        return MISSING
    if cell.mean is None:
        return FAILED
    spread = "" if cell.std is None else f" ± {100 * cell.std:.1f}"
    draws = "" if cell.draws is None else f" ({cell.draws})"
    return f"{100 * cell.mean:.1f}{spread}{draws}{mark(cell)}"


def mark(cell: Cell) -> str:
    """Give the star of a cell whose solver stopped early, else nothing."""
    return UNCONVERGED if cell.status == "not_converged" else ""


def standing_text(cell: Cell | None) -> str:
    """Give `[65.1, 65.9] rank 1`, as far as it is known."""
    if cell is None or cell.mean is None:
        return ""
    interval, rank = cell.standing.interval, cell.standing.rank
    bounds = [] if interval is None else [f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"]
    return " ".join([*bounds, *([] if rank is None else [f"rank {rank}"])])


def exact_percent(share: float) -> str:
    """Give a fraction in percent with all its digits: the shortest decimal that reads back, its point moved."""
    return f"{Decimal(repr(share)).scaleb(2):f}"


def row_text(row: Row) -> str:
    """Give the checkpoint's name, with its architecture where the name does not say it, and what one must know."""
    source = f"published in {row.source}" if row.source else ""
    aside = [part for part in ("" if row.arch in row.name else row.arch, row.note, source) if part]
    return f"{row.name} ({', '.join(aside)})" if aside else row.name


def legend(table: Table) -> tuple[str, ...]:
    """Say how the cells are to be read, and what a reader of the whole table must know."""
    cells = table.cells.values()
    lines = ["Top-1 accuracy in percent: mean ± sample standard deviation over draws (number of draws)."]
    if any(cell.standing.interval for cell in cells):
        lines.append("[low, high]: 95 % interval over test images of this kind, apart from the spread over draws.")
    if any(cell.standing.rank for cell in cells):
        lines.append(
            "rank: within a column; checkpoints that their images cannot tell apart share one "
            "(exact paired test, 5 % over all pairs)."
        )
    if any(cell.status == "not_converged" for cell in cells):
        lines.append(f"{UNCONVERGED} the solver did not reach its certificate.")
    if any(cell.status == "failed" for cell in cells):
        lines.append(f"{FAILED}: a draw gave no number; its record says why.")
    return (*lines, *table.notices)
