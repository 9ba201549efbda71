"""Accuracy per class, for the first checkpoints of a column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msn_eval.data.class_names import describe_classes
from msn_eval.errors import StoreError, format_count
from msn_eval.results.predictions import name_classes
from msn_eval.results.record import Result
from msn_eval.results.statistics import bin_confidences
from msn_eval.results.table import Cell, Column, Row, Table

_MOST_ROWS = 8
_MOST_COUNTS = 60_000  # of all views together: a few hundred kilobytes of the page


@dataclass(frozen=True, kw_only=True)
class ClassView:
    """One column, class by class.

    Attributes:
        column: The protocol.
        rows: Its first checkpoints.
        names: Class names by label, those of WordNet ids with their words.
        images: (classes,) number of validation images.
        right: Per row, (classes,) number of correct predictions, summed over draws.
        draws: Draws of every row.
        bins: Per row, the images of all draws by confidence, as (number, mean confidence, accuracy), bins without images left
            out. Empty without probabilities.
    """

    column: Column
    rows: tuple[Row, ...]
    names: tuple[str, ...]
    images: tuple[int, ...]
    right: tuple[tuple[int, ...], ...]
    draws: int
    bins: tuple[tuple[tuple[float, ...], ...], ...] = ()


def make_class_views(
    table: Table, records: Mapping[str, tuple[Result, Path]]
) -> tuple[tuple[ClassView, ...], tuple[str, ...]]:
    """Return the views of the measured columns that have predictions, and notices about those left out.

    Args:
        table: The table.
        records: By id, each with its file; its predictions are beside it.
    """
    views: list[ClassView] = []
    counts, left_out, faults = 0, 0, []
    for column in table.columns:
        present = [(row, table.cells[row, column]) for row in table.rows if (row, column) in table.cells]
        cells = [(row, cell) for row, cell in present if cell.mean is not None and cell.results]
        draws = max((len(cell.results) for _, cell in cells), default=0)
        chosen = [(row, cell) for row, cell in cells if len(cell.results) == draws][:_MOST_ROWS]
        counts += column.classes * len(chosen)
        if counts > _MOST_COUNTS and views:
            left_out += bool(chosen)
            continue
        try:
            view = _make_view(column, chosen, draws, records)
            views += [view] if view is not None else []
        except StoreError as error:
            faults.append(f"No accuracy per class of {column.group}, {column.title}: {error}")
    notice = f"Accuracy per class is not shown for {format_count(left_out, 'protocol')}, to limit the size of the page."
    return tuple(views), (*([notice] if left_out else []), *faults)


def _make_view(
    column: Column, cells: Sequence[tuple[Row, Cell]], draws: int, records: Mapping[str, tuple[Result, Path]]
) -> ClassView | None:
    """Return the view of the cells that have the predictions of all draws, None if there is no such cell."""
    right: dict[Row, tuple[int, ...]] = {}
    bins: list[tuple[tuple[float, ...], ...]] = []
    names: list[str] = []
    images: list[int] = []
    for row, cell in cells:
        files = [records[identity][1].with_name(f"{identity}.npz") for identity in cell.results]
        if not all(file.exists() for file in files):
            continue
        counts = np.zeros(column.classes, dtype=np.int64)
        binned = []
        for file in files:
            try:
                with np.load(file, allow_pickle=False) as stored:
                    label, rank = stored["label"], stored["rank_of_label"]
                    if "confidence" in stored:
                        binned.append(bin_confidences(stored["confidence"], rank == 1))
                    if not names:  # once, since decompressing the ids takes longest
                        images = np.bincount(label, minlength=column.classes).tolist()
                        names = [f"class {number}" for number in range(column.classes)]
                        for number, name in name_classes(stored["image"], label).items():
                            names[number] = name
            except Exception as error:  # zipfile, zlib and NumPy each have their own kinds
                raise StoreError(f"cannot be read as predictions: {error}", where=str(file)) from error
            counts += np.bincount(label[rank == 1], minlength=column.classes)
        right[row] = tuple(counts.tolist())
        columns = np.sum(binned, axis=0).T.tolist() if len(binned) == draws else []
        bins.append(tuple((int(n), round(sure / n, 4), round(good / n, 4)) for n, sure, good in columns if n))
    if not right:
        return None
    shown = zip(names, describe_classes(names), strict=True)
    names = [name if name == described else f"{described} ({name})" for name, described in shown]
    counts_by_row = tuple(right.values())
    return ClassView(
        column=column,
        rows=tuple(right),
        names=tuple(names),
        images=tuple(images),
        right=counts_by_row,
        draws=draws,
        bins=tuple(bins) if any(bins) else (),
    )
