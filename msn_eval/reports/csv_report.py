"""Tables in CSV (RFC 4180): a line a checkpoint, seven fields a protocol."""

import csv
import io

from msn_eval.errors import one_line
from msn_eval.reports.text_tables import FAILED, exact_percent
from msn_eval.results.table import Cell, Table

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "'")
_ROW = ("checkpoint", "note", "architecture", "weights_sha256", "source")
_CELL = ("top1 %", "std %", "95 % low %", "95 % high %", "draws", "rank", "status")


def render_csv(table: Table) -> str:
    """Give the whole table; percents with all their digits; empty fields where there is no result."""
    written = io.StringIO()
    writer = csv.writer(written)
    fields = [f"{column.group}, {column.title}: {name}" for column in table.columns for name in _CELL]
    writer.writerow(map(_text, (*_ROW, *fields)))
    for row in table.rows:
        line = [_text(text) for text in (row.name, row.note, row.arch, row.weights_sha256 or "", row.source)]
        for column in table.columns:
            line += _fields(table.cells.get((row, column)))
        writer.writerow(line)
    return written.getvalue()


def _fields(cell: Cell | None) -> list[str]:
    if cell is None:
        return [""] * len(_CELL)
    numbers = (cell.mean, cell.std, *(cell.standing.interval or (None, None)))
    top1, *others = ("" if number is None else exact_percent(number) for number in numbers)
    counts = ("" if count is None else str(count) for count in (cell.draws, cell.standing.rank))
    return [top1 or FAILED, *others, *counts, cell.status]


def _text(text: str) -> str:
    """Keep a spreadsheet from taking a text for a formula: it gets a quote before it, as does one that begins with a quote."""
    shown = one_line(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown
