"""`msn-eval cache list|verify|prune`: features kept on disk so that they need not be computed again."""

import argparse
import contextlib
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import StoreError, UsageError, format_count, one_line

if TYPE_CHECKING:
    from msn_eval.features.cache import FeatureFolder

_WIDEST = 200  # characters of a key's description: much of it may be a stranger's text
_DAY_SECONDS = 86400


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify|prune")
    verify, prune = (
        "read every byte and set damaged shards aside",
        "remove what --older-than, --max-bytes or --all names",
    )
    for action, what in {"list": "sizes and ages", "verify": verify, "prune": prune}.items():
        verb = actions.add_parser(action, help=what, allow_abbrev=False)
        verb.add_argument("--cache", metavar="DIR", help="default the user's cache folder")
    verb.add_argument("--older-than", metavar="DAYS", type=float, help="features that were not used for so long")
    verb.add_argument("--max-bytes", metavar="N", help="the longest unused until no more than N is left; 500M, 20G")
    verb.add_argument("--all", action="store_true", help="all features")
    verb.add_argument("--dry-run", action="store_true", help="print what would be removed, and keep it")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the action. Return the store's exit code where verify found damage, else 0."""
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.evaluation.plan import cache_folder

    cache = cache_folder(EvaluationConfig(cache=options.cache))
    if options.cache and not cache.is_dir():
        raise UsageError("no such folder", where=options.cache, hint="Give the --cache folder of a run.")
    return {"list": _list, "verify": _verify, "prune": _prune}[options.action](cache, options)


def _list(cache: Path, _: argparse.Namespace) -> int:
    from msn_eval.features.cache import read_manifests

    folders = _measure_folders(cache)
    for folder, size, used_seconds in folders:
        rows = sum(len(manifest.contents) for manifest in read_manifests(folder))
        used = f"used {_format_age(time.time() - used_seconds)} ago"
        print(
            f"{folder.digest[:12]}  {format_count(rows, 'row'):>16}  {_format_size(size):>9}  {used}  {_title(folder)}"
        )
    for name in ("hashes", "indexes"):
        if statuses := _statuses(cache / name):
            total = _format_size(sum(status.st_size for status in statuses))
            print(f"{name:<12}  {format_count(len(statuses), 'file'):>16}  {total:>9}  of data sets")
    print(f"{_sum_up([size for _, size, _ in folders])}, in {one_line(str(cache))}")
    return 0


def _verify(cache: Path, _: argparse.Namespace) -> int:
    from msn_eval.features.cache import describe_feature_folder, list_feature_folders, verify_feature_folder

    total = 0
    for folder in list_feature_folders(cache):
        valid, damaged = verify_feature_folder(folder)
        total += damaged
        state = f"{damaged} DAMAGED, moved to {one_line(str(folder.path))}/quarantine" if damaged else "no damage"
        name = one_line(describe_feature_folder(folder.path)[0][:_WIDEST])
        print(f"{folder.digest[:12]}  {format_count(valid + damaged, 'shard'):>13}  {state}  {name}")
    count = format_count(total, "damaged shard; its", "damaged shards; their")
    print(f"{count} features are computed again when needed" if total else "no damage")
    return StoreError.exit_code if total else 0


def _prune(cache: Path, options: argparse.Namespace) -> int:
    from msn_eval.features.cache import remove_feature_folder

    if not options.all and options.older_than is None and options.max_bytes is None:
        raise UsageError("it is not specified what to remove", hint="Pass --older-than DAYS, --max-bytes N or --all.")
    if options.older_than is not None and not options.older_than >= 0:
        raise UsageError(f"--older-than {options.older_than}: out of range", hint="Give days, 0 or more.")
    most_seconds = math.inf if options.older_than is None else options.older_than * _DAY_SECONDS
    most_bytes = math.inf if options.max_bytes is None else _parse_size(options.max_bytes)
    folders = _measure_folders(cache)
    kept_bytes = sum(size for _, size, _ in folders)
    removed: list[int] = []
    for folder, size, used_seconds in reversed(folders):  # the longest unused first
        if options.all or time.time() - used_seconds > most_seconds or kept_bytes > most_bytes:
            line = f"{folder.digest[:12]}  {_format_size(size):>9}  {_title(folder)}"
            if folder.path.is_symlink():
                print(f"{line}; KEPT, it is a link to another folder")
                continue
            if not options.dry_run:
                remove_feature_folder(folder)
            print(line)
            removed.append(size)
            kept_bytes -= size
    verb = "would be removed" if options.dry_run else "removed"
    print(f"{_sum_up(removed)}, {verb}; {_format_size(kept_bytes)} kept")
    return 0


def _measure_folders(cache: Path) -> "list[tuple[FeatureFolder, int, float]]":
    """Return every folder with its bytes and the time of its last use (seconds since 1970), the one used last first."""
    from msn_eval.features.cache import list_feature_folders

    folders = []
    for folder in list_feature_folders(cache):
        statuses = _statuses(folder.path)
        last_use = max((status.st_mtime for status in statuses), default=time.time())
        folders.append((folder, sum(status.st_size for status in statuses), last_use))
    return sorted(folders, key=lambda entry: -entry[2])


def _title(folder: "FeatureFolder") -> str:
    from msn_eval.features.cache import describe_feature_folder
    from msn_eval.results.row_names import shorten_architecture

    name, key = describe_feature_folder(folder.path)
    transform, patches = (key.get(part) for part in ("transform", "patches"))
    pixels = transform.get("crop") if isinstance(transform, dict) else None
    arch = shorten_architecture(str(key.get("arch")))
    details = f"{arch}, tap {key.get('tap')}, {pixels} px, {key.get('precision')} on {key.get('device')}"
    dropped = f", {patches.get('share')} of patches dropped" if isinstance(patches, dict) else ""
    return one_line(f"{name[:_WIDEST]} ({details[:_WIDEST]}{dropped[:_WIDEST]})" if key else name[:_WIDEST])


def _statuses(folder: Path) -> list[os.stat_result]:
    """Return the status of every file below a folder, following no link; files that vanish meanwhile are left out."""
    statuses = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                statuses.append(Path(parent, name).lstat())
    return statuses


def _parse_size(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([kmgt]?)b?", text.strip().lower())
    if match is None:
        raise UsageError(f"--max-bytes {text}: not a size", hint="Give a number of bytes, or 500M, 20G.")
    return float(match[1]) * float(1000 ** " kmgt".index(match[2] or " "))


def _format_size(count: int) -> str:
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B" if power else f"{count} B"


def _format_age(seconds: float) -> str:
    units = ((_DAY_SECONDS, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    unit, name = next((unit for unit in units if seconds >= 2 * unit[0]), units[-1])
    return f"{max(seconds, 0) / unit:.0f} {name}"


def _sum_up(sizes: Sequence[int]) -> str:
    return f"{format_count(len(sizes), 'set')} of features, {_format_size(sum(sizes))}"
