"""Report format `json`: columns, rows with their cells by protocol id, and notices."""

import json
from dataclasses import asdict
from typing import Any

from msn_eval.results.folder import ResultScan
from msn_eval.results.table import Cell, Table

suffix = "json"


def render(table: Table, scan: ResultScan) -> str:
    """Return the table as JSON."""
    rows = []
    for row in table.rows:
        columns = [column for column in table.columns if (row, column) in table.cells]
        cells = {column.protocol_id: _flatten(table.cells[row, column]) for column in columns}
        rows.append(asdict(row) | {"cells": cells})
    content = {"columns": [asdict(column) for column in table.columns], "rows": rows, "notices": table.notices}
    content["averages"] = [asdict(averages) for averages in table.averages]
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _flatten(cell: Cell) -> dict[str, Any]:
    content = asdict(cell)
    standing, measures = content.pop("standing"), content.pop("measures")
    return {**content, "interval95": standing["interval"], "rank": standing["rank"], **measures}
