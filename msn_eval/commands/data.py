"""`msn-eval data verify X`: read, decode and count every image of a data set, and compare it with a manifest."""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import DataError, UsageError, printable

if TYPE_CHECKING:
    from msn_eval.data.validation import DatasetCheck, SplitCheck

_PAIRS_SHOWN = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify")
    verify = actions.add_parser("verify", help="read and decode every image of both splits", allow_abbrev=False)
    verify.add_argument("data", metavar="X", help="a data set; see `msn-eval ls datasets`")
    verify.add_argument("--manifest", metavar="FILE", help="compare with its lines `HASH  split/CLASS/FILE`")
    verify.add_argument("--write-manifest", metavar="FILE", help="write these lines, for sha256sum and later runs")
    verify.add_argument(
        "--allow-class-mismatch", action="store_true", help="number the union of train's and val's classes"
    )
    verify.add_argument("--workers", metavar="N", default="auto", help="decoding processes, or auto")
    verify.add_argument("--json", action="store_true", help="print everything as JSON on stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the report. Return 21 where an image cannot be used or differs from the manifest."""
    from msn_eval.commands.progress import progress_on_stderr
    from msn_eval.data import read_dataset
    from msn_eval.data.validation import check_dataset, read_manifest, write_manifest
    from msn_eval.files.atomic import prepare_folder, write_atomically

    if not re.fullmatch("auto|[0-9]{1,4}", options.workers):
        raise UsageError(f"--workers {options.workers}: neither auto nor a number from 0 to 9999")
    workers = None if options.workers == "auto" else int(options.workers)
    out = None if options.write_manifest is None else Path(options.write_manifest)
    manifest = None if options.manifest is None else read_manifest(Path(options.manifest))
    if out is not None:  # checked before the hours that reading may take
        if options.manifest is not None and out.resolve() == Path(options.manifest).resolve():
            raise UsageError("--write-manifest would replace the manifest that is compared with", where=str(out))
        prepare_folder(out.parent, option="--write-manifest")
    data = read_dataset(options.data, allow_class_mismatch=options.allow_class_mismatch)
    with progress_on_stderr() as on_progress:
        check = check_dataset(data, workers=workers, manifest=manifest, on_progress=on_progress)
    if options.json:
        print(json.dumps(_as_json(check), indent=1, default=asdict))
    else:
        for line in _report(check):
            print(printable(line.replace("\n", "\\x0a").replace("\t", "\\x09")))
    if out is not None and check.unreadable:
        reason = f"not written, since {_count(check.unreadable, 'image')} cannot be used"
        print(printable(f"{out}: {reason}"), file=sys.stderr)
    elif out is not None:
        write_atomically(out, write_manifest(check.splits))
    return DataError.exit_code if check.unreadable or not check.matches_manifest else 0


def _report(check: "DatasetCheck") -> Iterator[str]:
    yield f"data         {check.name}"
    for name, split in check.splits.items():
        yield ""
        yield from _report_split(name, split)
    val = check.splits["val"]
    yield ""
    yield f"val in train {len(check.shared):,} of {_count(val.images, 'image')}, byte for byte"
    yield from (f"             val/{image} = train/{twin}" for image, twin in check.shared[:_PAIRS_SHOWN])
    if len(check.shared) > _PAIRS_SHOWN:
        yield f"             and {len(check.shared) - _PAIRS_SHOWN:,} more"
    yield f"data.sha256  {val.content_sha256 or 'none: not every image of val can be read'}"
    yield f"class map    {check.class_map_sha256}"
    if check.manifest is not None:
        differences = {name: names for name, names in vars(check.manifest).items() if name != "listed"}
        counts = ", ".join(f"{len(names):,} {name}" for name, names in differences.items())
        yield f"manifest     {_count(check.manifest.listed, 'image')} listed: {counts}"
        for name, names in differences.items():
            yield from (f"{name.upper():<12} {image}" for image in names)
    yield from (f"WARNING      {warning}" for warning in _list_warnings(check))
    for split in check.splits.values():
        yield from (f"UNREADABLE   {image.place}: {image.reason}" for image in split.unreadable)
    verdict = [f"{_count(check.unreadable, 'image')} cannot be used"] if check.unreadable else []
    verdict += [] if check.matches_manifest else ["the data set differs from the manifest"]
    yield f"verdict      {'; '.join(verdict) or 'every image can be used'}"


def _report_split(name: str, split: "SplitCheck") -> Iterator[str]:
    filled = {label: size for label, size in split.class_sizes.items() if size}
    yield f"{name:<12} {_count(split.images, 'image')}, {_count(len(filled), 'class', 'classes')}"
    if filled:
        least, most = min(filled, key=filled.__getitem__), max(filled, key=filled.__getitem__)
        yield f"  per class  {filled[least]:,} ({least}) to {filled[most]:,} ({most}) images"
    yield f"  passed     {_count(split.passed_over, 'file')} passed over: dotfiles and other suffixes"
    yield f"  kinds      {', '.join(f'{kind} {count:,}' for kind, count in split.kinds.items()) or 'none'}"
    if split.smallest is not None and split.largest is not None:
        sizes = (f"{size.width} x {size.height} ({size.image})" for size in (split.smallest, split.largest))
        yield f"  sizes      {' to '.join(sizes)}"
    yield f"  EXIF       {split.turned:,} with an orientation tag, which is ignored; {split.damaged_exif:,} damaged"
    yield f"  duplicates {_count(split.duplicates, 'image')} with the bytes of an earlier one"


def _list_warnings(check: "DatasetCheck") -> list[str]:
    look_alikes = [
        f"{name}: {' and '.join(map(_spell_out, group))} differ only by case or Unicode normalisation"
        for name, split in check.splits.items()
        for group in split.look_alikes
    ]
    return [*check.warnings, *look_alikes]


def _spell_out(name: str) -> str:
    return name if name.isascii() else f"{name} ({name!a})"


def _count(number: int, what: str, plural: str | None = None) -> str:
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"


def _as_json(check: "DatasetCheck") -> Mapping[str, object]:
    splits = {}
    for name, split in check.splits.items():
        fields = {key: value for key, value in vars(split).items() if key != "digests"}
        splits[name] = {"classes": sum(map(bool, split.class_sizes.values())), **fields}
    return {
        "name": check.name,
        "sound": not check.unreadable and check.matches_manifest,
        "splits": splits,
        "val_in_train": {
            "images": len(check.shared),
            "first": [{"val": image, "train": twin} for image, twin in check.shared[:_PAIRS_SHOWN]],
        },
        "data_sha256": check.splits["val"].content_sha256,
        "class_map_sha256": check.class_map_sha256,
        "manifest": check.manifest,
        "warnings": _list_warnings(check),
    }
