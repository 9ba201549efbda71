"""Published: accuracies that others printed, as rows that stand beside measured ones and are never ranked with them."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msn_eval.errors import StoreError
from msn_eval.files.package_data import shipped_folder
from msn_eval.results.table import Cell, Column, Row, Table

_PROBES = {"logreg": "logistic", "linear": "linear", "knn": "knn", "finetune": "finetune"}
_SUBSETS = {"100pct": "full"}
# Of ImageNet's 1,281,167 training images of 1,000 classes; the published 1 % list has 12,811.
_IMAGES_PER_CLASS = {"1img": 1, "2imgs": 2, "5imgs": 5, "1pct": 12.811, "10pct": 128.1167, "full": 1281.167}
_CLASSES = 1000
_METRIC = "top1"  # on ImageNet's validation images; other metrics of the file say where they were measured


@dataclass(frozen=True, kw_only=True)
class PublishedNumber:
    """One number as its source prints it.

    probe, subset: in our words; images that a subset of another laboratory holds may be others than ours
    percent, std:  as printed; std over draws, None where none is given
    verified:      whether the number was read in the source itself, or a transcription of it
    """

    method: str
    arch: str
    pretraining: str
    epochs: str
    probe: str
    subset: str
    metric: str
    percent: str
    std: str | None
    source: str
    verified: bool


def published_file() -> Path:
    """Give the file of published numbers that came with this package."""
    return shipped_folder("reports") / "published_results.csv"


def read_published(path: Path) -> tuple[PublishedNumber, ...]:
    """Read a file of published numbers. Raises StoreError naming the line that cannot be used."""
    numbers = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line, entry in enumerate(csv.DictReader(file, strict=True), start=2):
                try:
                    numbers.append(_number(entry))
                except (KeyError, TypeError, ValueError) as error:
                    raise StoreError(
                        f"line {line} is no published number: {type(error).__name__}: {error}", where=str(path)
                    ) from error
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise StoreError(f"cannot be read: {error}", where=str(path)) from error
    return tuple(numbers)


def _number(entry: dict[str, str]) -> PublishedNumber:
    percent, std = entry["value"], entry["std"] or None
    if not 0 <= float(percent) <= 100 or not float(std or 0) >= 0 or not entry["source"]:
        raise ValueError("a percentage with its source is needed")
    patch = entry["patch"]
    return PublishedNumber(
        method=entry["method"],
        arch=f"{entry['backbone']}/{patch}" if patch else entry["backbone"],
        pretraining=entry["pretrain_data"],
        epochs=entry["pretrain_epochs"],
        probe=_PROBES[entry["protocol"]],
        subset=_SUBSETS.get(entry["labels"], entry["labels"]),
        metric=entry["metric"],
        percent=percent,
        std=std,
        source=entry["source"],
        verified={"yes": True, "no": False}[entry["verified"]],
    )


def table_of_published(numbers: Iterable[PublishedNumber], columns: Sequence[Column]) -> Table:
    """Give published ImageNet numbers of the subsets in `columns`: of their probes, and of fine-tuning.

    They come in columns of their own, so that a protocol never shares one with a publication, whose code, penalty or lists
    may have been others; a row for each checkpoint and source.
    """
    subsets = {column.subset for column in columns}
    probes = {column.probe for column in columns} | {"finetune"}
    chosen = [one for one in numbers if one.metric == _METRIC and one.subset in subsets and one.probe in probes]
    places = {(one.probe, one.subset): _column(one.probe, one.subset) for one in chosen}
    rows = {_row(one): None for one in sorted(chosen, key=_order)}
    cells: dict[tuple[Row, Column], Cell] = {}
    for one in chosen:
        place = (_row(one), places[one.probe, one.subset])
        if place in cells:
            raise StoreError(f"{one.source} gives two numbers for {place[0].name} under {one.probe}, {one.subset}")
        cells[place] = Cell(
            mean=_fraction(one.percent),
            std=None if one.std is None else _fraction(one.std),
            draws=None,
            status="published",
        )
    return Table(rows=tuple(rows), columns=tuple(places.values()), cells=cells, notices=tuple(_notices(chosen)))


def _fraction(percent: str) -> float:
    """Give the float nearest to a hundredth of the printed number, so that it prints as it was printed."""
    return float(f"{percent}e-2")


def _column(probe: str, subset: str) -> Column:
    return Column(
        protocol_id=f"published {probe} {subset}",
        probe=probe,
        params={},
        subset=subset,
        data="imagenet",
        images_per_class=_IMAGES_PER_CLASS[subset],
        classes=_CLASSES,
        reason="published, imagenet",
        published=True,
    )


def _row(one: PublishedNumber) -> Row:
    of = f"{one.pretraining}, {one.epochs} epochs" if one.epochs else one.pretraining
    note = of if one.verified else f"{of}, unverified"
    return Row(
        name=f"{one.method} {one.arch}", arch=one.arch, weights_sha256=None, key=None, note=note, source=one.source
    )


def _order(one: PublishedNumber) -> tuple[object, ...]:
    return one.method.casefold(), one.arch, one.source, one.epochs


def _notices(chosen: Sequence[PublishedNumber]) -> Iterator[str]:
    if not chosen:
        yield "No published number is known for the probes and subsets of this table."
        return
    yield (
        "Published rows are ImageNet accuracies as their sources print them, by other code and at times on other images; "
        "they are not ranked with measured ones."
    )
    if not all(one.verified for one in chosen):
        yield "A row marked unverified was not read in the source that it names."
