"""Tables as a page: one HTML file that asks nothing of any network, and opens from a disk, a mail or a web server."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from msn_eval.errors import printable
from msn_eval.reports.html.charts import neighbour_charts, shot_charts
from msn_eval.reports.html.class_view import ClassView, make_class_views
from msn_eval.reports.html.page import render_offline
from msn_eval.reports.html.provenance import pack_records
from msn_eval.reports.text_tables import FAILED, UNCONVERGED
from msn_eval.results.folder import ResultScan
from msn_eval.results.record import Result
from msn_eval.results.table import Cell, Column, Row, Table

_SHADES = 8
_OPEN_CHARTS = 2  # of a part; the others unfold


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The head of a column. number: its place in the table."""

    number: int
    subset: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Group:
    number: int
    name: str
    published: bool
    columns: tuple[_Head, ...]


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A cell as texts. plain: a published number, behind which there is no record."""

    mean: str
    spread: str
    rank: int | None
    mark: str
    look: str
    plain: bool


@dataclass(frozen=True, kw_only=True)
class _Line:
    name: str
    aside: str
    published: bool
    cells: tuple[_Shown | None, ...]


def render_html(table: Table, scan: ResultScan, *, show_published: bool) -> str:
    """Give the page of a table.

    scan:           the records that the table was made from, and their files
    show_published: whether published rows, where the table has some, are shown from the start
    """
    records = {result.id: (result, path) for result, path in zip(scan.results, scan.paths, strict=True)}
    views, unseen = make_class_views(table, records)
    return render_offline(
        "page.html",
        script="page.js",
        styles=["page.css"],
        data=_data(table, records, views),
        title=_title(table),
        facts=_facts(table, len(scan.results)),
        notices=[printable(notice) for notice in (*table.notices, *unseen)],
        groups=_groups(table),
        rows=_lines(table),
        has_published=any(column.published for column in table.columns),
        show_published=show_published,
        unconverged=any(cell.status == "not_converged" for cell in table.cells.values()),
        chart_parts=_chart_parts(table),
        has_classes=bool(views),
    )


def _printable(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(name)): _printable(inner) for name, inner in value.items()}
    return [_printable(inner) for inner in value] if isinstance(value, list | tuple) else value


def _title(table: Table) -> str:
    names = dict.fromkeys(column.data for column in table.columns if not column.published)
    return printable(f"{', '.join(names)}: low-shot accuracy")


def _facts(table: Table, records: int) -> list[str]:
    measured = [row for row in table.rows if not row.source]
    columns = [column for column in table.columns if not column.published]
    classes = sorted({column.classes for column in columns})
    return [
        _counted(len(measured), "checkpoint"),
        _counted(len(columns), "protocol"),
        _counted(records, "record"),
        f"{' or '.join(f'{count:,}' for count in classes)} classes",
    ]


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _groups(table: Table) -> list[_Group]:
    place = {column: number for number, column in enumerate(_ordered(table))}
    heads = []
    for number, (name, columns) in enumerate(_grouped(table)):
        shown = tuple(
            _Head(number=place[column], subset=printable(column.subset), lines=_below(column)) for column in columns
        )
        heads.append(_Group(number=number, name=printable(name), published=columns[0].published, columns=shown))
    return heads


def _grouped(table: Table) -> list[tuple[str, tuple[Column, ...]]]:
    """Give the groups of columns, the published numbers of a probe behind its measured ones."""
    groups = list(table.groups().items())
    probes = list(dict.fromkeys(column.probe for column in table.columns if not column.published))

    def place(group: tuple[str, tuple[Column, ...]]) -> tuple[int, bool]:
        probe = group[1][0].probe
        return probes.index(probe) if probe in probes else len(probes), group[1][0].published

    return sorted(groups, key=place)


def _ordered(table: Table) -> list[Column]:
    return [column for _, columns in _grouped(table) for column in columns]


def _below(column: Column) -> tuple[str, ...]:
    """Give what stands below the subset in a column's head."""
    return tuple(printable(line.replace(" a class", " / class")) for line in column.lines[1:])


def _lines(table: Table) -> list[_Line]:
    columns = _ordered(table)
    shades = {column: _shades(table, column) for column in columns}
    return [
        _Line(
            name=printable(row.name),
            aside=_aside(row),
            published=bool(row.source),
            cells=tuple(_shown(table.cells.get((row, column)), shades[column].get(row, 0)) for column in columns),
        )
        for row in table.rows
    ]


def _aside(row: Row) -> str:
    """Give what stands below a name: its architecture, where the name does not say it, and what one must know."""
    return printable(
        ", ".join(part for part in ("" if row.arch in row.name else row.arch, row.note, row.source) if part)
    )


def _shades(table: Table, column: Column) -> dict[Row, int]:
    """Give the shade of each cell of a column, from its lowest number to its highest.

    Checkpoints that their images cannot tell apart share one, that of their mean: a colour must not tell them apart either.
    """
    found = [(row, table.cells[row, column]) for row in table.rows if (row, column) in table.cells]
    means = {row: cell.mean for row, cell in found if cell.mean is not None}
    together: defaultdict[int, list[float]] = defaultdict(list)
    for row, cell in found:
        if cell.standing.rank is not None and row in means:
            together[cell.standing.rank].append(means[row])
    levels = {
        row: fmean(together[cell.standing.rank]) if cell.standing.rank is not None else means[row]
        for row, cell in found
        if row in means
    }
    low, high = min(levels.values(), default=0.0), max(levels.values(), default=0.0)
    return {
        row: round(_SHADES * (level - low) / (high - low)) if high > low else _SHADES // 2
        for row, level in levels.items()
    }


def _shown(cell: Cell | None, shade: int) -> _Shown | None:
    if cell is None:
        return None
    plain = cell.status == "published"
    if cell.mean is None:
        return _Shown(mean=FAILED, spread="", rank=None, mark="", look="failed", plain=plain)
    look = "plain" if plain else f"h{shade} first" if cell.standing.rank == 1 else f"h{shade}"
    return _Shown(
        mean=f"{100 * cell.mean:.1f}",
        spread="" if cell.std is None else f"{100 * cell.std:.1f}",
        rank=cell.standing.rank,
        mark=UNCONVERGED if cell.status == "not_converged" else "",
        look=look,
        plain=plain,
    )


def _chart_parts(table: Table) -> list[dict[str, object]]:
    parts = (
        (
            "curves",
            "Label efficiency",
            "Accuracy against labelled images a class, both as measured; the band is one standard deviation over draws.",
            shot_charts(table),
        ),
        ("neighbours", "k-NN over k", "Accuracy against the number of neighbours that vote.", neighbour_charts(table)),
    )
    return [
        {"id": name, "title": title, "lead": lead, "charts": charts, "open": _OPEN_CHARTS}
        for name, title, lead, charts in parts
        if charts
    ]


def _data(table: Table, records: Mapping[str, tuple[Result, Path]], views: Sequence[ClassView]) -> dict[str, object]:
    """Give what the script needs: names, a few numbers of each cell, and the records, in the order of the cells."""
    columns = _ordered(table)
    groups = [number for number, (_, group) in enumerate(_grouped(table)) for _ in group]
    sharing = _sharing(table)
    ordered: list[Result] = []
    cells = []
    for row in table.rows:
        line: list[object] = []
        for column in columns:
            cell = table.cells.get((row, column))
            line.append(0 if cell is None else _numbers(cell, sharing.get((column, cell.standing.rank), 1)))
            ordered += [records[identity][0] for identity in cell.results] if cell is not None else []
        cells.append(line)
    names = list(dict.fromkeys(view.names for view in views))
    packed = pack_records(ordered)
    place = {column: number for number, column in enumerate(columns)}
    line_of = {row: number for number, row in enumerate(table.rows)}
    return {
        "rows": _printable(
            [{"name": row.name, "arch": row.arch, "note": f"{row.note} {row.source}"} for row in table.rows]
        ),
        "measured": sum(1 for row in table.rows if not row.source),
        "columns": [
            {"title": printable(f"{column.group}, {column.title}"), "group": group}
            for column, group in zip(columns, groups, strict=True)
        ],
        "cells": cells,
        "classes": names,
        "views": [
            {
                "column": place[view.column],
                "rows": [line_of[row] for row in view.rows],
                "names": names.index(view.names),
                "images": view.images,
                "right": view.right,
                "draws": view.draws,
            }
            for view in views
        ],
        **{name: part if name == "records" else _printable(part) for name, part in packed.items()},
    }


def _numbers(cell: Cell, tied: int) -> object:
    """Give how many records a cell has, its rank, how many share it, its mean and its interval; of a cell with a single
    record the last three are in the record, and of one without rank or with it alone there is no more to say."""
    count, rank = len(cell.results), cell.standing.rank
    if count == 1:
        return count if rank is None else [count, rank] if tied == 1 else [count, rank, tied]
    mean = None if cell.mean is None else round(cell.mean, 7)
    bounds = [round(bound, 4) for bound in cell.standing.interval or ()]
    return [count, rank, tied, mean, *bounds]


def _sharing(table: Table) -> dict[tuple[Column, int | None], int]:
    """Count the checkpoints that share each rank of each column."""
    counts: dict[tuple[Column, int | None], int] = {}
    for (_, column), cell in table.cells.items():
        if cell.standing.rank is not None:
            key = (column, cell.standing.rank)
            counts[key] = counts.get(key, 0) + 1
    return counts
