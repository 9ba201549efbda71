"""The texts of rows and cells that every printed form shares: percent with one decimal, as papers print it."""

from msn_eval.table import Cell, Row, Table

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
    mark = UNCONVERGED if cell.status == "not_converged" else ""
    return f"{100 * cell.mean:.1f}{spread} ({cell.draws}){mark}"


def row_text(row: Row) -> str:
    """Give the checkpoint's name, with its architecture where the name does not say it, and what one must know."""
    aside = [part for part in ("" if row.arch in row.name else row.arch, row.note) if part]
    return f"{row.name} ({', '.join(aside)})" if aside else row.name


def legend(table: Table) -> str:
    """Say how the cells are to be read."""
    text = "Top-1 accuracy in percent: mean ± sample standard deviation over draws (number of draws)."
    if any(cell.status == "not_converged" for cell in table.cells.values()):
        text += f" {UNCONVERGED} the solver did not reach its certificate."
    return text
