"""Tables in JSON: the lossless form; accuracies are fractions."""

import json
from dataclasses import asdict
from typing import Any

from msn_eval.results.table import Cell, Table


def render_json(table: Table) -> str:
    """Give columns, rows, for each row its cells by protocol id with the ids of their records, and the notices."""
    content = {
        "columns": [asdict(column) for column in table.columns],
        "rows": [
            asdict(row)
            | {
                "cells": {
                    column.protocol_id: _cell(table.cells[row, column])
                    for column in table.columns
                    if (row, column) in table.cells
                }
            }
            for row in table.rows
        ],
        "notices": table.notices,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _cell(cell: Cell) -> dict[str, Any]:
    content = asdict(cell)
    standing = content.pop("standing")
    return content | {"interval95": standing["interval"], "rank": standing["rank"]}
