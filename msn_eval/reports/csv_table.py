"""Report format `csv`: the complete table, percentages with all their digits, empty fields where there is no result."""

import csv
import io
from collections.abc import Sequence

from msn_eval.errors import one_line
from msn_eval.reports.text_tables import format_accuracy, format_exact_percent
from msn_eval.results.data_sets import DataSetAverages
from msn_eval.results.folder import ResultScan
from msn_eval.results.table import Cell, Row, Table

suffix = "csv"
_ROW_FIELDS = ("checkpoint", "note", "architecture", "weights_sha256", "source")
_CELL_FIELDS = ("top1 %", "std %", "95 % low %", "95 % high %", "draws", "rank", "status")
_CHANGE = "change %"  # of a test set
_AVERAGE_FIELDS = ("mean top1 %", "mean rank", "groups", "Friedman p")
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "'")  # first characters


def render(table: Table, scan: ResultScan) -> str:
    """Return the table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    headers = [
        f"{column.group}, {column.title}: {name}"
        for column in table.columns
        for name in (*_CELL_FIELDS, *table.measures, *([_CHANGE] if column.test else []))
    ]
    headers += [f"{averages.title}, over data sets: {name}" for averages in table.averages for name in _AVERAGE_FIELDS]
    writer.writerow(map(escape_csv, (*_ROW_FIELDS, *headers)))
    for row in table.rows:
        fields = [escape_csv(value) for value in (row.name, row.note, row.arch, row.weights_sha256 or "", row.source)]
        for column in table.columns:
            cell = table.cells.get((row, column))
            fields += _format_cell(cell, table.measures)
            if column.test:
                fields.append("" if cell is None or cell.change is None else f"{100 * cell.change:.15g}")
        for averages in table.averages:
            fields += _format_average(row, averages)
        writer.writerow(fields)
    return text.getvalue()


def _format_cell(cell: Cell | None, measures: Sequence[str]) -> list[str]:
    if cell is None:
        return [""] * (len(_CELL_FIELDS) + len(measures))
    numbers = (cell.mean, cell.std, *(cell.standing.interval or (None, None)))
    top1, *others = ("" if number is None else format_exact_percent(number) for number in numbers)
    counts = ("" if count is None else str(count) for count in (cell.draws, cell.standing.rank))
    values = ("" if (value := cell.measures.get(name)) is None else repr(value) for name in measures)
    return [top1 or format_accuracy(cell), *others, *counts, cell.status, *values]


def _format_average(row: Row, averages: DataSetAverages) -> list[str]:
    for own in averages.rows:
        if (own.weights_sha256, own.key) == (row.weights_sha256, row.key):
            p_value = "" if averages.p_value is None else repr(averages.p_value)
            return [format_exact_percent(own.accuracy), repr(own.rank), own.groups, p_value]
    return [""] * len(_AVERAGE_FIELDS)


def escape_csv(text: str) -> str:
    """Return one line that no spreadsheet takes for a formula: such a text, and one that starts with a quote, gets a quote."""
    shown = one_line(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown
