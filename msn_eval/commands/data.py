"""`msn-eval data verify X`: every image of a data set read, decoded and counted, and compared with a manifest."""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import DataError, UsageError, printable

if TYPE_CHECKING:
    from rich.progress import TaskID

    from msn_eval.data.image_info import Progress
    from msn_eval.data.validation import DatasetCheck, ManifestCheck, Sized, SplitCheck

_log = logging.getLogger(__name__)
_PAIRS_SHOWN = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="verify")
    verify = actions.add_parser("verify", help="read and decode every image of both splits", allow_abbrev=False)
    verify.add_argument("data", metavar="X", help="a data set; see `msn-eval ls datasets`")
    verify.add_argument("--manifest", metavar="FILE", help="compare with its lines `HASH  split/CLASS/FILE`")
    verify.add_argument("--write-manifest", metavar="FILE", help="write them, for sha256sum and later runs")
    verify.add_argument(
        "--allow-class-mismatch", action="store_true", help="number the union of train's and val's classes"
    )
    verify.add_argument("--workers", metavar="N", default="auto", help="decoding processes, or auto")
    verify.add_argument("--json", action="store_true", help="everything, as JSON on stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print what was found; give 21 where an image cannot be used or is not what the manifest says."""
    from msn_eval.data import read_dataset
    from msn_eval.data.validation import check_dataset, read_manifest, write_manifest
    from msn_eval.files.atomic import prepare_folder, write_atomically

    workers = _read_workers(options.workers)
    out = None if options.write_manifest is None else Path(options.write_manifest)
    manifest = None if options.manifest is None else read_manifest(Path(options.manifest))
    if out is not None:  # before the hours that reading may take
        if manifest is not None and out.resolve() == Path(options.manifest).resolve():
            raise UsageError("--write-manifest would replace the manifest that is compared with", where=str(out))
        prepare_folder(out.parent, option="--write-manifest")
    data = read_dataset(options.data, allow_class_mismatch=options.allow_class_mismatch)
    with _progress_on_stderr() as on_progress:
        check = check_dataset(data, workers=workers, manifest=manifest, on_progress=on_progress)
    if options.json:
        print(json.dumps(_as_json(check), indent=1, allow_nan=False))
    else:
        for line in _report(check):
            print(printable(line))
    sys.stdout.flush()
    unreadable = sum(len(split.unreadable) for split in check.splits)
    if out is not None and unreadable:
        print(
            f"{printable(str(out))}: not written, since {_count(unreadable, 'image')} cannot be used", file=sys.stderr
        )
    elif out is not None:
        write_atomically(out, write_manifest(check.splits))
    return 0 if check.sound else DataError.exit_code


def _read_workers(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 4:
        raise UsageError(f"--workers {text}: neither auto nor a number from 0 to 9999")
    return int(text)


@contextlib.contextmanager
def _progress_on_stderr() -> "Iterator[Progress | None]":
    """Give a callback that draws progress and its rate on a terminal's stderr, or None where stderr is none."""
    if not sys.stderr.isatty() or not _log.isEnabledFor(logging.INFO):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, rate="…")
            speed = bar.tasks[tasks[what]].speed
            bar.update(tasks[what], completed=done, rate="…" if speed is None else f"{speed:,.0f}")

        yield show


def _report(check: "DatasetCheck") -> Iterator[str]:
    """Give what there is to say, a line each."""
    yield f"data         {_name(check.name)}"
    for split in check.splits:
        yield ""
        yield from _split_lines(split)
    yield ""
    yield f"val in train {len(check.shared):,} of {_count(check.splits[-1].images, 'image')}, byte for byte"
    for val, train in check.shared[:_PAIRS_SHOWN]:
        yield f"             val/{_name(val)} = train/{_name(train)}"
    if len(check.shared) > _PAIRS_SHOWN:
        yield f"             and {len(check.shared) - _PAIRS_SHOWN:,} more"
    yield f"data.sha256  {check.splits[-1].content_sha256 or 'none: not every image of val can be read'}"
    yield f"class map    {check.class_map_sha256}"
    if check.manifest is not None:
        yield from _manifest_lines(check.manifest)
    yield from (f"WARNING      {_name(warning)}" for warning in check.warnings)
    yield from (f"WARNING      {warning}" for split in check.splits for warning in _look_alike_warnings(split))
    bad = sum(len(split.unreadable) for split in check.splits)
    for split in check.splits:
        yield from (f"UNREADABLE   {_name(entry.place)}: {_name(entry.reason)}" for entry in split.unreadable)
    verdict = [f"{_count(bad, 'image')} cannot be used"] if bad else []
    verdict += ["the data set differs from the manifest"] if check.manifest and not check.manifest.agrees else []
    yield f"verdict      {'; '.join(verdict) or 'every image can be used'}"


def _split_lines(split: "SplitCheck") -> Iterator[str]:
    filled = {name: size for name, size in split.class_sizes.items() if size}
    yield f"{split.split:<12} {_count(split.images, 'image')}, {_count(len(filled), 'class', 'classes')}"
    if filled:
        least, most = min(filled, key=lambda name: filled[name]), max(filled, key=lambda name: filled[name])
        yield f"  a class    {filled[least]:,} ({_name(least)}) to {filled[most]:,} ({_name(most)}) images"
    yield f"  passed     {_count(split.passed_over, 'file')} passed over: dotfiles and other suffixes"
    yield f"  kinds      {', '.join(f'{kind} {count:,}' for kind, count in split.kinds.items()) or 'none'}"
    if split.smallest is not None and split.largest is not None:
        yield f"  sizes      {_size(split.smallest)} to {_size(split.largest)}"
    yield f"  EXIF       {split.turned:,} turned by their orientation tag, which is ignored; {split.damaged_exif:,} damaged"
    yield f"  duplicates {_count(split.duplicates, 'image')} with the bytes of an earlier one"


def _size(image: "Sized") -> str:
    return f"{image.width} x {image.height} ({_name(image.image)})"


def _manifest_lines(manifest: "ManifestCheck") -> Iterator[str]:
    names = {"CHANGED": manifest.changed, "MISSING": manifest.missing, "EXTRA": manifest.extra}
    counts = ", ".join(f"{len(found):,} {what.lower()}" for what, found in names.items())
    yield f"manifest     {_count(manifest.listed, 'image')} listed: {counts}"
    for what, found in names.items():
        yield from (f"{what:<12} {_name(name)}" for name in found)


def _look_alike_warnings(split: "SplitCheck") -> Iterator[str]:
    for group in split.look_alikes:
        yield f"{split.split}: {' and '.join(map(_spelled, group))} differ only by case or Unicode normalisation"


def _spelled(name: str) -> str:
    """Give a name so that two spellings of one look can be told apart."""
    return _name(name) if name.isascii() else f"{_name(name)} ({name!a})"


def _name(text: str) -> str:
    """Keep a stranger's text to the line that it is on."""
    return text.replace("\n", "\\x0a").replace("\t", "\\x09")


def _count(number: int, what: str, several: str | None = None) -> str:
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"


def _as_json(check: "DatasetCheck") -> Mapping[str, object]:
    """Give the same facts as the report."""
    return {
        "name": check.name,
        "sound": check.sound,
        "splits": {split.split: _split_json(split) for split in check.splits},
        "val_in_train": {
            "images": len(check.shared),
            "first": [{"val": val, "train": train} for val, train in check.shared[:_PAIRS_SHOWN]],
        },
        "data_sha256": check.splits[-1].content_sha256,
        "class_map_sha256": check.class_map_sha256,
        "manifest": None
        if check.manifest is None
        else {
            "listed": check.manifest.listed,
            "changed": check.manifest.changed,
            "missing": check.manifest.missing,
            "extra": check.manifest.extra,
        },
        "warnings": [
            *check.warnings,
            *(warning for split in check.splits for warning in _look_alike_warnings(split)),
        ],
    }


def _split_json(split: "SplitCheck") -> Mapping[str, object]:
    def sized(image: "Sized | None") -> Mapping[str, object] | None:
        return None if image is None else {"image": image.image, "width": image.width, "height": image.height}

    return {
        "images": split.images,
        "classes": sum(size > 0 for size in split.class_sizes.values()),
        "class_sizes": split.class_sizes,
        "passed_over": split.passed_over,
        "kinds": split.kinds,
        "turned": split.turned,
        "damaged_exif": split.damaged_exif,
        "smallest": sized(split.smallest),
        "largest": sized(split.largest),
        "unreadable": [
            {"image": entry.image, "place": entry.place, "reason": entry.reason} for entry in split.unreadable
        ],
        "duplicates": split.duplicates,
        "look_alikes": split.look_alikes,
        "content_sha256": split.content_sha256,
    }
