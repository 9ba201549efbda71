"""Curves: accuracies of a table over labelled images, and over k, as charts."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from msn_eval.errors import printable
from msn_eval.reports.html.charts import Chart, Line, Point, draw_chart
from msn_eval.results.table import Cell, Column, Row, Table

MOST_LINES = 8
_MOST_CROSSINGS = 12
_SUBSET_TEXTS = {"1img": "1", "2imgs": "2", "5imgs": "5", "1pct": "1 %", "10pct": "10 %", "full": "all"}


def shot_charts(table: Table) -> list[Chart]:
    """Give a chart for each group of measured columns that has more than one subset: accuracy over images a class."""
    found: list[tuple[str, Chart]] = []
    for group, columns in table.groups().items():
        chosen = _one_a_place([column for column in columns if not column.published], lambda one: one.images_per_class)
        if len(chosen) > 1:
            ticks = _apart([(one.images_per_class, *_tick_texts(one)) for one in chosen])
            x_title = "labelled images a class, log scale"
            charts = _chart(table, chosen, lambda one: one.images_per_class, ticks, title=group, x_title=x_title)
            found += [(chosen[0].probe, chart) for chart in charts]
    seen: Counter[str] = Counter()
    places = []
    for probe, _ in found:
        places.append(seen[probe])
        seen[probe] += 1
    # Each probe once before any of them twice.
    return [found[number][1] for number in sorted(range(len(found)), key=places.__getitem__)]


def neighbour_charts(table: Table) -> list[Chart]:
    """Give a chart for each subset on which several k were measured, all else equal: accuracy over k."""
    alike: defaultdict[tuple[object, ...], list[Column]] = defaultdict(list)
    for column in table.columns:
        if "k" in column.params and not column.published:
            alike[column.subset, column.params["temperature"], column.reason].append(column)
    charts: list[Chart] = []
    for (subset, temperature, reason), columns in alike.items():
        chosen = _one_a_place(columns, _neighbours)
        if len(chosen) > 1:
            title = ", ".join(str(part) for part in (f"knn T={temperature:g}", subset, reason) if part)
            ticks = _apart([(_neighbours(one), f"{_neighbours(one):g}", "") for one in chosen])
            charts += _chart(table, chosen, _neighbours, ticks, title=title, x_title="neighbours k, log scale")
    return charts


def _neighbours(column: Column) -> float:
    return float(column.params["k"])


def _tick_texts(column: Column) -> tuple[str, str]:
    text = _SUBSET_TEXTS.get(column.subset, printable(column.subset)[:12])
    images = f"{column.images_per_class:.3g}"
    return (text, "" if text == images else images)


def _one_a_place(columns: Sequence[Column], place: Callable[[Column], float]) -> list[Column]:
    """Give columns in rising order; of several at one place the first, since a line has one point there."""
    return sorted({place(column): column for column in reversed(columns)}.values(), key=place)


def _apart(ticks: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Keep the texts of neighbouring ticks from covering each other: the smaller of two close ones loses its own."""
    span = max(tick[0] for tick in ticks) / min(tick[0] for tick in ticks)
    kept: list[tuple[float, str, str]] = []
    for x, text, below in reversed(ticks):
        close = bool(kept) and (kept[-1][0] / x) < span**0.055
        kept.append((x, "" if close else text, "" if close else below))
    return kept[::-1]


def _chart(
    table: Table,
    columns: Sequence[Column],
    place: Callable[[Column], float],
    ticks: list[tuple[float, str, str]],
    *,
    title: str,
    x_title: str,
) -> list[Chart]:
    """Give the chart of the first checkpoints that have a number in one of the columns, or none where nothing has."""
    names = [row for row in table.rows if any(_is_number(table.cells.get((row, column))) for column in columns)]
    lines = [_line(table, row, columns, place) for row in names[:MOST_LINES]]
    if not lines:
        return []
    more = f" (the first {MOST_LINES} of {len(names):,} checkpoints)" if len(names) > MOST_LINES else ""
    title = f"{printable(title)}{more}"
    return [draw_chart(lines, ticks=ticks, title=title, x_title=x_title, most_crossings=_MOST_CROSSINGS)]


def _is_number(cell: Cell | None) -> bool:
    return cell is not None and cell.mean is not None


def _line(table: Table, row: Row, columns: Sequence[Column], place: Callable[[Column], float]) -> Line:
    name, points = printable(row.name), []
    for column in columns:
        cell = table.cells.get((row, column))
        if cell is not None and cell.mean is not None:
            std = None if cell.std is None else 100 * cell.std
            text = f"{name}, {printable(column.title)}: {100 * cell.mean:.1f}" + (
                "" if std is None else f" ± {std:.1f}"
            )
            points.append(Point(x=place(column), mean=100 * cell.mean, std=std, text=text))
    return Line(name=name, points=tuple(points))
