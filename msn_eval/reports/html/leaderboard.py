"""Report format `html`: an offline page that opens from a disk, a mail or a web server."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from msn_eval.errors import format_count
from msn_eval.reports.html.charts import draw_neighbour_charts, draw_ranks, draw_shot_charts, name_data
from msn_eval.reports.html.class_view import ClassView, make_class_views
from msn_eval.reports.html.page import make_printable, render_offline
from msn_eval.reports.html.provenance import pack_records
from msn_eval.reports.text_tables import (
    MISSING,
    describe_averages,
    describe_details,
    format_accuracy,
    format_change,
    format_convergence_mark,
)
from msn_eval.results.folder import ResultScan
from msn_eval.results.record import Result
from msn_eval.results.table import Cell, Column, Row, Table, make_table

suffix = "html"
_SHADES = 8
Records = Mapping[str, tuple[Result, Path]]


def render(table: Table, scan: ResultScan) -> str:
    """Return the page of a table; if it is of ImageNet, published numbers are included, hidden unless the table has them."""
    show_published = any(column.published for column in table.columns)
    if not show_published and any(map(is_imagenet, scan.results)):
        table = _add_published(table)
    records = {result.id: (result, path) for result, path in zip(scan.results, scan.paths, strict=True)}
    views, view_notices = make_class_views(table, records)
    groups = _order_groups(table)
    columns = [column for _, group in groups for column in group]
    measured = [column for column in columns if not column.published]
    shot_charts, neighbour_charts = draw_shot_charts(table), draw_neighbour_charts(table)
    return render_offline(
        "page.html",
        title=f"{', '.join({column.data: None for column in measured if column.base is None})}: low-shot accuracy",
        kicker="accuracy of frozen checkpoints when labels are scarce",
        facts=_list_facts(table, measured, len(scan.results)),
        assets=["page.js"],
        origin=f" from records alone, the last of {max((result.created for result in scan.results), default='no date')}",
        data=_page_data(table, groups, records, views),
        notices=(*table.notices, *view_notices),
        groups=[(name, group[0].published, [column.lines for column in group]) for name, group in groups],
        rows=_page_rows(table, columns),
        has_published=len(measured) < len(columns),
        show_published=show_published,
        is_dated=False,
        data_sets=list(dict.fromkeys(name_data(column) for column in measured)),
        has_stds=any(cell.std is not None for cell in table.cells.values()),
        has_ranks=any(cell.standing.rank for cell in table.cells.values()),
        has_rings=any(chart.rings for row in (*shot_charts, *neighbour_charts) for chart in row.charts),
        shot_charts=shot_charts,
        neighbour_charts=neighbour_charts,
        has_classes=bool(views),
        averages=[(describe_averages(averages), draw_ranks(averages)) for averages in table.averages],
    )


def _list_facts(table: Table, measured: Sequence[Column], records: int) -> list[str]:
    checkpoints = sum(not row.source for row in table.rows)
    counts = {"checkpoint": checkpoints, "protocol": len(measured), "record": records}
    classes = " or ".join(f"{count:,}" for count in sorted({column.classes for column in measured}))
    return [*(format_count(count, name) for name, count in counts.items()), f"{classes} classes"]


def is_imagenet(result: Result) -> bool:
    """Whether a record is of the classes of ImageNet, so that published numbers can be compared with it."""
    from msn_eval.data.imagenet_subsets import read_publication

    return result.data.class_map_sha256 == read_publication().class_map_sha256


def _add_published(table: Table) -> Table:
    from msn_eval.results.published import make_published_table, read_published

    published = make_table((), published=make_published_table(read_published(), table.columns))
    return replace(
        table,
        rows=(*table.rows, *published.rows),
        columns=(*table.columns, *published.columns),
        cells={**table.cells, **published.cells},
        notices=tuple(dict.fromkeys((*published.notices, *table.notices))),  # a notice may be in both
    )


def _order_groups(table: Table) -> list[tuple[str, tuple[Column, ...]]]:
    """Return the groups of columns, the published numbers of a probe after its measured ones."""
    probes = list(dict.fromkeys(column.probe for column in table.columns if not column.published))

    def key(group: tuple[str, tuple[Column, ...]]) -> tuple[int, bool]:
        column = group[1][0]
        return probes.index(column.probe) if column.probe in probes else len(probes), column.published

    return sorted(table.groups().items(), key=key)


def _page_rows(table: Table, columns: Sequence[Column]) -> list[dict[str, object]]:
    shades = {column: _choose_shades(table, column) for column in columns}
    rows = []
    for row in table.rows:
        cells = [
            (*_page_cell(table.cells.get((row, column)), shades[column].get(row, 0)), column.published)
            for column in columns
        ]
        texts = {"name": row.name, "details": describe_details(row), "published": bool(row.source)}
        rows.append({**texts, "cells": cells})
    return rows


def _choose_shades(table: Table, column: Column) -> dict[Row, int]:
    """Return the shade of each cell of a column, from its lowest number to its highest.

    Checkpoints that share a rank share the shade of their mean: their difference is not statistically significant.
    """
    ranks: dict[Row, object] = {}
    by_rank: defaultdict[object, list[float]] = defaultdict(list)
    for row in table.rows:
        cell = table.cells.get((row, column))
        if cell is not None and cell.mean is not None:
            ranks[row] = cell.standing.rank or row
            by_rank[ranks[row]].append(cell.mean)
    levels = {row: fmean(by_rank[rank]) for row, rank in ranks.items()}
    low, high = min(levels.values(), default=0.0), max(levels.values(), default=0.0)
    if low == high:
        return dict.fromkeys(levels, _SHADES // 2)
    return {row: round(_SHADES * (level - low) / (high - low)) for row, level in levels.items()}


def _page_cell(cell: Cell | None, shade: int) -> tuple[str, bool, int | None, str, str, str]:
    """Return CSS class, whether there is a record behind the number, rank, mean, std and mark."""
    if cell is None:
        return "none", False, None, MISSING, "", ""
    mean, _, std = format_accuracy(cell).partition(" ± ")
    has_records = bool(cell.results)
    first = " first" if cell.standing.rank == 1 else ""
    css_class = f"h{shade}{first}" if has_records else "plain"
    if cell.mean is None:
        css_class = cell.status
    if unconverged := format_convergence_mark(cell):
        css_class += " unconverged"
    mark = unconverged + ("" if cell.change is None else f" ({format_change(cell.change)})")
    return css_class, has_records, cell.standing.rank, mean, std, mark


def _page_data(
    table: Table, groups: Sequence[tuple[str, tuple[Column, ...]]], records: Records, views: Sequence[ClassView]
) -> dict[str, object]:
    """Return what the script reads: names, a few numbers of each cell, and the records in the order of the cells."""
    columns = [(number, column) for number, (_, group) in enumerate(groups) for column in group]
    tied = Counter((column, cell.standing.rank) for (_, column), cell in table.cells.items())
    results: list[Result] = []
    cells = []
    for row in table.rows:
        numbers: list[object] = []
        for _, column in columns:
            cell = table.cells.get((row, column))
            numbers.append(0 if cell is None else _cell_numbers(cell, tied[column, cell.standing.rank]))
            results += [records[identity][0] for identity in cell.results] if cell is not None else []
        cells.append(numbers)
    class_names = list(dict.fromkeys(view.names for view in views))
    column_list = [column for _, column in columns]
    packed = pack_records(results)
    packed_records = packed.pop("records")  # ids and numbers, which are printable
    texts = {
        "rows": [{"name": row.name, "arch": row.arch, "note": f"{row.note} {row.source}"} for row in table.rows],
        "columns": [
            {
                "title": f"{column.group}, {column.title}",
                "group": group,
                "id": column.protocol_id,
                "data": "" if column.published else name_data(column),
            }
            for group, column in columns
        ],
        "classes": class_names,
        **packed,
    }
    return {
        "measured": sum(not row.source for row in table.rows),
        "cells": cells,
        "records": packed_records,
        "views": [
            {
                **{name: getattr(view, name) for name in ("images", "right", "draws", "bins")},
                "column": column_list.index(view.column),
                "rows": [table.rows.index(row) for row in view.rows],
                "names": class_names.index(view.names),
            }
            for view in views
        ],
        **{name: make_printable(value) for name, value in texts.items()},
    }


def _cell_numbers(cell: Cell, tied: int) -> list[object]:
    """Return the number of records, the rank and how many share it; of several records also the mean and the interval.

    The page's script has mean and interval of a single record from that record.
    """
    numbers: list[object] = [len(cell.results), cell.standing.rank, tied if cell.standing.rank else 1]
    if len(cell.results) != 1:
        numbers.append(None if cell.mean is None else round(cell.mean, 7))
        numbers += [round(bound, 4) for bound in cell.standing.interval or ()]
    return numbers
