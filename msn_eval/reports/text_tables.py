"""The texts of rows and cells that every printed form shares: percent with one decimal, as papers print it."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import Any

from msn_eval.errors import one_line
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


_SPECIAL = re.compile(r"([\\`*_<>\[\]|#~&!@$])")


def markdown_text(text: str) -> str:
    """Give `text` on one line with everything escaped that Markdown or HTML in it would mean."""
    return _SPECIAL.sub(r"\\\1", one_line(text))


def markdown_line(cells: Sequence[str]) -> str:
    """Give one row of a table from cells that are escaped already."""
    return "| " + " | ".join(cells) + " |"


def markdown_row(cells: Sequence[str]) -> str:
    """Give one row of a table from plain text."""
    return markdown_line([markdown_text(cell) for cell in cells])


def render_markdown(table: Table) -> str:
    """Give one Markdown table for each probe and its settings."""
    parts = []
    for group, columns in table.groups().items():
        header = ["checkpoint", *(markdown_text(column.title) for column in columns)]
        lines = [f"### {markdown_text(group)}", "", markdown_line(header), "| --- |" + " ---: |" * len(columns)]
        lines += [
            markdown_line([markdown_text(row_text(row)), *map(_cell, cells)]) for row, cells in table.rows_of(columns)
        ]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "  \n".join(map(markdown_text, legend(table)))]) + "\n"


def _cell(cell: Cell | None) -> str:
    # Our own text: brackets around two numbers are no link.
    return " ".join(part for part in (markdown_text(cell_text(cell)), standing_text(cell)) if part)


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


def render_json(table: Table) -> str:
    """Give columns, rows, for each row its cells by protocol id with the ids of their records, and the notices."""
    content = {
        "columns": [asdict(column) for column in table.columns],
        "rows": [
            asdict(row)
            | {
                "cells": {
                    column.protocol_id: _json_cell(table.cells[row, column])
                    for column in table.columns
                    if (row, column) in table.cells
                }
            }
            for row in table.rows
        ],
        "notices": table.notices,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _json_cell(cell: Cell) -> dict[str, Any]:
    content = asdict(cell)
    standing = content.pop("standing")
    return content | {"interval95": standing["interval"], "rank": standing["rank"]}
