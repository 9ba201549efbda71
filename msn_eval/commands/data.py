"""`msn-eval data verify X`: read, decode and count every image of a data set, and compare it with a manifest.

`msn-eval data split DIR --out DIR`: draw a val split for class folders that have none.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import DataError, UsageError, format_count, printable

if TYPE_CHECKING:
    from msn_eval.data.validation import DatasetCheck

_PAIRS_SHOWN = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify|split")
    verify = actions.add_parser("verify", help="read and decode every image of both splits", allow_abbrev=False)
    add = verify.add_argument
    add("data", metavar="X", help="a data set; see `msn-eval ls datasets`")
    add("--manifest", type=Path, metavar="FILE", help="compare with its lines `HASH  split/CLASS/FILE`")
    add("--write-manifest", type=Path, metavar="FILE", help="write these lines, for sha256sum and later runs")
    add("--allow-class-mismatch", action="store_true", help="number the union of train's and val's classes")
    add("--workers", metavar="N", default="auto", help="decoding processes, or auto")
    add("--json", action="store_true", help="print everything as JSON on stdout")
    split = actions.add_parser("split", help="draw a val split for class folders that have none", allow_abbrev=False)
    split.add_argument("data", type=Path, metavar="DIR", help="a folder with one folder per class")
    split.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the CSV file that names the splits"
    )
    size = split.add_mutually_exclusive_group()
    size.add_argument("--val-share", metavar="F", help="share of each class for val, rounded up; default 0.2")
    size.add_argument("--val-per-class", metavar="N", help="number of images of each class for val")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the action."""
    return _split(options) if options.action == "split" else _verify(options)


def _split(options: argparse.Namespace) -> int:
    """Write the CSV file and print what it holds."""
    from fractions import Fraction

    from msn_eval.data.csv_list import write_csv
    from msn_eval.data.folder import folder_name
    from msn_eval.data.val_split import DEFAULT_SHARE, draw_val, read_class_folders
    from msn_eval.files.atomic import prepare_folder

    share, per_class = options.val_share, options.val_per_class
    if share is not None and not (re.fullmatch(r"\d*\.\d{1,9}", share) and 0 < Fraction(share) < 1):
        raise UsageError(
            f"--val-share {share} is not a share between 0 and 1", hint="Write --val-share 0.2, for example."
        )
    if per_class is not None and not re.fullmatch(r"[1-9]\d{0,8}", per_class):
        raise UsageError(f"--val-per-class {per_class} is not a positive number")
    images = read_class_folders(options.data)
    val = draw_val(
        images,
        share=Fraction(share) if share else DEFAULT_SHARE,
        per_class=int(per_class) if per_class else None,
    )
    prepare_folder(options.out, option="--out")
    table = options.out / f"{folder_name(options.data)}.csv"
    rows = []
    for image_id, label in zip(images.ids, images.labels, strict=True):
        path = Path(os.path.relpath(options.data.resolve() / image_id, options.out.resolve())).as_posix()
        rows.append((path, images.classes[label], "val" if image_id in val else "train"))
    write_csv(table, rows)
    print(printable(f"{len(rows) - len(val):,} train, {format_count(len(val), 'val image')}: --data csv:{table}"))
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Print the report. Return 21 where an image cannot be used or differs from the manifest."""
    from msn_eval.commands.progress import progress_on_stderr
    from msn_eval.data import read_dataset
    from msn_eval.data.validation import check_dataset, read_manifest, write_manifest
    from msn_eval.files.atomic import prepare_folder, write_atomically

    if not re.fullmatch("auto|[0-9]{1,4}", options.workers):
        raise UsageError(f"--workers {options.workers}: neither auto nor a number from 0 to 9999")
    workers = None if options.workers == "auto" else int(options.workers)
    out, manifest = options.write_manifest, options.manifest and read_manifest(options.manifest)
    if out is not None:  # checked before the hours that reading may take
        if options.manifest is not None and out.resolve() == options.manifest.resolve():
            raise UsageError("--write-manifest would replace the manifest that is compared with", where=str(out))
        prepare_folder(out.parent, option="--write-manifest")
    data = read_dataset(options.data, allow_class_mismatch=options.allow_class_mismatch)
    with progress_on_stderr() as on_progress:
        check = check_dataset(data, workers=workers, manifest=manifest, on_progress=on_progress)
    if options.json:
        print(json.dumps(_as_json(check), indent=1))
    else:
        for line in _report(check):
            print(printable(line.replace("\n", "\\x0a").replace("\t", "\\x09")))
    if out is not None and check.unreadable:
        reason = f"not written, since {format_count(check.unreadable, 'image')} cannot be used"
        print(printable(f"{out}: {reason}"), file=sys.stderr)
    elif out is not None:
        write_atomically(out, write_manifest(check.splits))
    return 0 if check.sound else DataError.exit_code


def _report(check: "DatasetCheck") -> Iterator[str]:
    yield f"data         {check.name}"
    for name, split in check.splits.items():
        yield ""
        yield f"{name:<12} {format_count(split.images, 'image')}, {format_count(split.classes, 'class', 'classes')}"
        if filled := {label: size for label, size in split.class_sizes.items() if size}:
            least, most = min(filled, key=filled.__getitem__), max(filled, key=filled.__getitem__)
            yield f"  per class  {filled[least]:,} ({least}) to {filled[most]:,} ({most}) images"
        yield f"  passed     {format_count(split.passed_over, 'file')} passed over: dotfiles and other suffixes"
        yield f"  kinds      {', '.join(f'{kind} {count:,}' for kind, count in split.kinds.items()) or 'none'}"
        if sizes := [size for size in (split.smallest, split.largest) if size is not None]:
            yield f"  sizes      {' to '.join(f'{size.width} x {size.height} ({size.image})' for size in sizes)}"
        yield f"  EXIF       {split.turned:,} with an orientation tag, which is ignored; {split.damaged_exif:,} damaged"
        yield f"  duplicates {format_count(split.duplicates, 'image')} with the bytes of an earlier one"
    yield ""
    yield f"val in train {len(check.shared):,} of {format_count(check.splits['val'].images, 'image')}, byte for byte"
    yield from (f"             val/{image} = train/{twin}" for image, twin in check.shared[:_PAIRS_SHOWN])
    if len(check.shared) > _PAIRS_SHOWN:
        yield f"             and {len(check.shared) - _PAIRS_SHOWN:,} more"
    yield f"data.sha256  {check.splits['val'].content_sha256 or 'none: not every image of val can be read'}"
    yield f"class map    {check.class_map_sha256}"
    verdict = [f"{format_count(check.unreadable, 'image')} cannot be used"] if check.unreadable else []
    if check.differences is not None:
        counts = ", ".join(f"{len(names):,} {name}" for name, names in check.differences.items())
        yield f"manifest     {format_count(check.listed, 'image')} listed: {counts}"
        yield from (f"{name.upper():<12} {image}" for name, names in check.differences.items() for image in names)
        verdict += ["the data set differs from the manifest"] if any(check.differences.values()) else []
    yield from (f"WARNING      {warning}" for warning in check.warnings)
    for split in check.splits.values():
        yield from (f"UNREADABLE   {image['place']}: {image['reason']}" for image in split.unreadable)
    yield f"verdict      {'; '.join(verdict) or 'every image can be used'}"


def _as_json(check: "DatasetCheck") -> dict[str, object]:
    fields = asdict(check)
    for split in fields["splits"].values():
        del split["hashes"]
    shared, listed, differences = (fields.pop(name) for name in ("shared", "listed", "differences"))
    first = [{"val": image, "train": twin} for image, twin in shared[:_PAIRS_SHOWN]]
    return fields | {
        "sound": check.sound,
        "val_in_train": {"images": len(shared), "first": first},
        "data_sha256": check.splits["val"].content_sha256,
        "manifest": None if differences is None else {"listed": listed, **differences},
    }
