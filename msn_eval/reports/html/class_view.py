"""Class view: how often each class is right, for the checkpoints that lead a column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import StoreError, printable
from msn_eval.results.record import Result
from msn_eval.results.table import Cell, Column, Row, Table

_Numbers = NDArray[np.int64]
MOST_ROWS = 8
_MOST_COUNTS = 60_000  # of all views together; a page holds a few hundred kilobytes of them


@dataclass(frozen=True, kw_only=True)
class ClassView:
    """One column, class by class.

    rows:   checkpoints
    names:  of the classes, by label
    images: (classes,) validation images of each
    right:  for each row (classes,) how often its images are right, over all draws together
    draws:  of every row
    """

    column: Column
    rows: tuple[Row, ...]
    names: tuple[str, ...]
    images: tuple[int, ...]
    right: tuple[tuple[int, ...], ...]
    draws: int


def make_class_views(
    table: Table, results: Mapping[str, tuple[Result, Path]]
) -> tuple[tuple[ClassView, ...], tuple[str, ...]]:
    """Give a view of each measured column that has predictions, as many as there is room for, and what is to be said of
    those left out.

    results: the records by id, each with its file, beside which its predictions are
    """
    views: list[ClassView] = []
    counts, left_out, faults = 0, 0, []
    for column in (one for one in table.columns if not one.published):
        cells = [(row, table.cells[row, column]) for row in table.rows if _is_whole(table.cells.get((row, column)))]
        draws = max((cell.draws or 0 for _, cell in cells), default=0)
        chosen = [(row, cell) for row, cell in cells if cell.draws == draws][:MOST_ROWS]
        counts += column.classes * len(chosen)
        if counts > _MOST_COUNTS and views:
            left_out += 1
            continue
        try:
            view = _view(column, chosen, results)
        except StoreError as error:
            faults.append(f"No class by class view of {column.group}, {column.title}: {error}")
            continue
        views += [view] if view is not None else []
    notices = [f"{left_out} protocols are not shown class by class: there are too many."] if left_out else []
    return tuple(views), (*notices, *faults)


def _is_whole(cell: Cell | None) -> bool:
    return cell is not None and cell.mean is not None and bool(cell.results)


def _view(
    column: Column, cells: Sequence[tuple[Row, Cell]], results: Mapping[str, tuple[Result, Path]]
) -> ClassView | None:
    rows: list[Row] = []
    right: list[tuple[int, ...]] = []
    images, names = np.zeros(0, dtype=np.int64), tuple[str, ...]()
    for row, cell in cells:
        counts = np.zeros(column.classes, dtype=np.int64)
        read = 0
        for identity in cell.results:
            beside = results[identity][1].with_name(f"{identity}.npz")
            if not beside.exists():
                continue
            label, rank, image = _stored(beside, with_images=not names)
            counts += np.bincount(label[rank == 1], minlength=column.classes)
            read += 1
            if not names:
                images = np.bincount(label, minlength=column.classes)
                names = _names(image, label, column.classes)
        if read == cell.draws:
            rows.append(row)
            right.append(tuple(counts.tolist()))
    if not rows:
        return None
    return ClassView(
        column=column,
        rows=tuple(rows),
        names=names,
        images=tuple(images.tolist()),
        right=tuple(right),
        draws=cells[0][1].draws or 0,
    )


def _stored(path: Path, *, with_images: bool) -> tuple[_Numbers, _Numbers, NDArray[np.bytes_]]:
    """Give the labels, their ranks and, where asked for, the images of stored predictions; unpacking ids takes longest."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            image = stored["image"] if with_images else np.zeros(0, dtype=np.bytes_)
            return stored["label"], stored["rank_of_label"], image
    except Exception as error:  # zipfile, zlib and NumPy each have their own kinds
        raise StoreError(f"are no readable predictions: {error}", where=str(path)) from error


def _names(image: NDArray[np.bytes_], label: _Numbers, classes: int) -> tuple[str, ...]:
    """Give each class its name, the folder of its images; a class without images has its number."""
    names = [f"class {number}" for number in range(classes)]
    present, first = np.unique(label, return_index=True)
    for number, place in zip(present.tolist(), first.tolist(), strict=True):
        names[number] = printable(bytes(image[place]).decode("utf-8", "surrogateescape").rpartition("/")[0])
    return tuple(names)
