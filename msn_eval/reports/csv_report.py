"""Tables in CSV (RFC 4180): a line a checkpoint, three fields a protocol."""

import csv
import io

from msn_eval.errors import printable
from msn_eval.reports.texts import FAILED
from msn_eval.table import Cell, Table

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\0")


def render_csv(table: Table) -> str:
    """Give the whole table; means and standard deviations in percent, unrounded; empty where there is no result."""
    written = io.StringIO()
    writer = csv.writer(written)
    header = ["checkpoint", "note", "architecture", "weights_sha256"]
    for column in table.columns:
        name = f"{column.group}, {column.title}"
        header += [f"{name}: top1 %", f"{name}: std %", f"{name}: draws"]
    writer.writerow(map(_text, header))
    for row in table.rows:
        line: list[str] = [_text(row.name), _text(row.note), _text(row.arch), row.weights_sha256]
        for column in table.columns:
            line += _fields(table.cells.get((row, column)))
        writer.writerow(line)
    return written.getvalue()


def _fields(cell: Cell | None) -> list[str]:
    if cell is None:
        return ["", "", ""]
    mean = FAILED if cell.mean is None else repr(100 * cell.mean)
    return [mean, "" if cell.std is None else repr(100 * cell.std), str(cell.draws)]


def _text(text: str) -> str:
    """Keep a spreadsheet from taking a name for a formula."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown
