"""Tables in JSON: the lossless form; accuracies are fractions."""

import json
from dataclasses import asdict

from msn_eval.table import Table


def render_json(table: Table) -> str:
    """Give columns, rows, and for each row its cells by protocol id."""
    content = {
        "columns": [asdict(column) for column in table.columns],
        "rows": [
            asdict(row)
            | {
                "cells": {
                    column.protocol_id: asdict(table.cells[row, column])
                    for column in table.columns
                    if (row, column) in table.cells
                }
            }
            for row in table.rows
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
