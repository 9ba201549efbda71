"""Published accuracies, as rows beside measured ones. They are never ranked with them."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msn_eval.files.package_data import find_package_folder
from msn_eval.results.table import Cell, Column, Row, Table

if TYPE_CHECKING:
    import pandas as pd

_NAMES = {"pretrain_data": "pretraining", "pretrain_epochs": "epochs", "protocol": "probe", "labels": "subset",
          "value": "percent"}  # fmt: skip
# Published linear probes train on random crops and flips, which `linear`, on cached features, does not.
_VALUES = {"probe": {"logreg": "logistic", "linear": "linear-augmented"}, "subset": {"100pct": "full"}}
# Of ImageNet's 1,281,167 training images of 1,000 classes; the published 1 % list has 12,811.
_IMAGES_PER_CLASS = {"1img": 1, "2imgs": 2, "5imgs": 5, "1pct": 12.811, "10pct": 128.1167, "full": 1281.167}


def read_published() -> "pd.DataFrame":
    """Read the published numbers that come with this package.

    Returns:
        One row per number, exactly as its source prints it: the strings `method`, `arch`, `pretraining`, `epochs`, `probe`
        and `subset` (by this package's names; a subset of another laboratory may hold different images), `metric`,
        `percent`, `std` (over draws, empty where none is printed) and `source`, and the boolean `verified`: whether the
        number was read in the source itself, and not in a transcription.
    """
    import pandas as pd

    path = find_package_folder("reports") / "published_results.csv"
    numbers = pd.read_csv(path, dtype=str, keep_default_na=False)
    arch = (numbers["backbone"] + "/" + numbers["patch"]).str.removesuffix("/")
    return numbers.rename(columns=_NAMES).replace(_VALUES).assign(arch=arch, verified=numbers["verified"] == "yes")


def make_published_table(numbers: "pd.DataFrame", columns: Sequence[Column]) -> Table:
    """Make a table of the published ImageNet numbers that belong beside measured columns.

    These are the numbers of the columns' subsets and probes, and of fine-tuning. They have columns of their own, because
    code, penalty and lists of a publication may differ; and a row for each checkpoint and source.

    Args:
        numbers: Published numbers, as from `read_published`.
        columns: Measured columns.
    """
    subsets = {column.subset for column in columns}
    probes = {column.probe for column in columns} | {"finetune"}
    # `top1` is on ImageNet's validation images; other metrics of the file name their own images.
    is_wanted = numbers["subset"].isin(subsets) & numbers["probe"].isin(probes) & (numbers["metric"] == "top1")
    wanted = numbers[is_wanted].sort_values(["source", "epochs"])
    wanted = wanted.sort_values(["method", "arch"], key=lambda names: names.str.casefold(), kind="stable")
    cells = {}
    for number in wanted.to_dict("records"):
        # The floats nearest to a hundredth of what is printed, so that they print as they were printed.
        mean, std = (float(f"{number[name]}e-2") if number[name] else None for name in ("percent", "std"))
        cells[_make_row(number), _make_column(number)] = Cell(mean=mean, std=std, draws=None, status="published")
    return Table(
        rows=tuple(dict.fromkeys(row for row, _ in cells)),
        columns=tuple(dict.fromkeys(column for _, column in cells)),
        cells=cells,
        notices=tuple(_list_notices(wanted)),
    )


def _make_column(number: Mapping[Hashable, Any]) -> Column:
    probe, subset = number["probe"], number["subset"]
    return Column(
        protocol_id=f"published {probe} {subset}",
        probe=probe,
        params={},
        subset=subset,
        data="imagenet",
        images_per_class=_IMAGES_PER_CLASS[subset],
        classes=1000,
        reason="imagenet, published",
        published=True,
    )


def _make_row(number: Mapping[Hashable, Any]) -> Row:
    epochs = f", {number['epochs']} epochs" if number["epochs"] else ""
    return Row(
        name=f"{number['method']} {number['arch']}",
        arch=number["arch"],
        weights_sha256=None,
        key=None,
        note=f"{number['pretraining']}{epochs}{'' if number['verified'] else ', unverified'}",
        source=number["source"],
    )


def _list_notices(numbers: "pd.DataFrame") -> Iterator[str]:
    if numbers.empty:
        yield "No published number is known for the probes and subsets of this table."
        return
    yield (
        "Published rows are ImageNet accuracies as their sources print them, by other code and at times on other images; "
        "they are not ranked with measured ones."
    )
    if not numbers["verified"].all():
        yield "A row marked unverified was not read in the source that it names."
