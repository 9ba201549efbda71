"""`msn-eval cache list|verify|prune`: what is kept on disk so that it need not be computed again."""

import argparse
import contextlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import StoreError, UsageError, printable

if TYPE_CHECKING:
    from msn_eval.features.cache import Bank

_THOUSANDS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_WIDEST = 200  # of what a key says about itself, in characters: much of it may be a stranger's text
_DAY_SECONDS = 86400


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One bank of features as people see it. used_seconds: since 1970, when it was last opened or written."""

    bank: "Bank"
    title: str
    bytes: int
    used_seconds: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("action", choices=("list", "verify", "prune"), help="list: sizes and ages; verify: read every "
                        "byte and set damaged shards aside; prune: remove what --older-than or --max-bytes name")  # fmt: skip
    parser.add_argument("--cache", metavar="DIR", help="default the user's cache folder")
    parser.add_argument(
        "--older-than", metavar="DAYS", type=float, help="prune features that were not used for so long"
    )
    parser.add_argument(
        "--max-bytes", metavar="N", help="prune the longest unused until no more than N is left; 500M, 20G"
    )
    parser.add_argument("--all", action="store_true", help="prune all features")
    parser.add_argument("--dry-run", action="store_true", help="say what prune would remove, and keep it")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do what was asked; give 0, or the store's exit code where verify found damage."""
    from msn_eval.config.request import EvaluationConfig
    from msn_eval.evaluation.plan import cache_folder

    cache = cache_folder(EvaluationConfig(cache=options.cache))
    if options.cache and not cache.is_dir():
        raise UsageError("no such folder", where=options.cache, hint="Give the --cache folder of a run.")
    if options.action == "prune":
        _prune(cache, options)
        return 0
    for name in ("older_than", "max_bytes", "all", "dry_run"):
        if getattr(options, name) is not None and getattr(options, name) is not False:  # 0 days are said, too
            raise UsageError(f"--{name.replace('_', '-')} goes with prune alone", hint="See msn-eval cache --help.")
    return _list(cache) if options.action == "list" else _verify(cache)


def _list(cache: Path) -> int:
    from msn_eval.features.cache import read_manifests

    entries = _entries(cache)
    for entry in entries:
        rows = sum(len(manifest.contents) for manifest in read_manifests(entry.bank))
        age = f"used {_age(entry.used_seconds)} ago"
        _say(f"{entry.bank.digest[:12]}  {rows:>11,} rows  {_size(entry.bytes):>9}  {age}  {entry.title}")
    for name in ("hashes", "indexes"):
        statuses = _statuses(cache / name)
        if statuses:
            size = _size(sum(status.st_size for status in statuses))
            _say(f"{name:<12}  {len(statuses):>10,} files  {size:>9}  of data sets")
    _say(f"{_sets(len(entries))}, {_size(sum(entry.bytes for entry in entries))}, in {cache}")
    return 0


def _verify(cache: Path) -> int:
    from msn_eval.features.cache import check_bank, describe_bank, list_banks

    all_damaged = 0
    for bank in list_banks(cache):
        sound, damaged = check_bank(bank)
        all_damaged += damaged
        state = f"{damaged} DAMAGED, moved to {bank.folder / 'quarantine'}" if damaged else "no damage"
        _say(f"{bank.digest[:12]}  {sound + damaged:>6} shards  {state}  {describe_bank(bank.folder)[0]:.{_WIDEST}}")
    _say(f"{all_damaged} damaged shards; their features are computed again when needed" if all_damaged else "no damage")
    return StoreError.exit_code if all_damaged else 0


def _prune(cache: Path, options: argparse.Namespace) -> None:
    from msn_eval.features.cache import remove_bank, sweep_pruned

    if not options.all and options.older_than is None and options.max_bytes is None:
        raise UsageError("nothing said of what to remove", hint="Pass --older-than DAYS, --max-bytes N or --all.")
    if options.older_than is not None and not options.older_than >= 0:
        raise UsageError(f"--older-than {options.older_than}: out of range", hint="Give days, 0 or more.")
    limit = None if options.max_bytes is None else _bytes(options.max_bytes)
    entries = _entries(cache)
    kept_bytes = sum(entry.bytes for entry in entries)
    removed: list[_Entry] = []
    for entry in reversed(entries):  # the longest unused first
        too_old = (
            options.older_than is not None and time.time() - entry.used_seconds > options.older_than * _DAY_SECONDS
        )
        too_much = limit is not None and kept_bytes > limit
        if not (options.all or too_old or too_much):
            continue
        line = f"{entry.bank.digest[:12]}  {_size(entry.bytes):>9}  {entry.title}"
        if entry.bank.folder.is_symlink():
            _say(f"{line}; LEFT ALONE, it is a link to elsewhere")
            continue
        if not options.dry_run:
            remove_bank(entry.bank)
        _say(line)
        removed.append(entry)
        kept_bytes -= entry.bytes
    if not options.dry_run:
        sweep_pruned(cache)
    size = _size(sum(entry.bytes for entry in removed))
    verb = "would be removed" if options.dry_run else "removed"
    _say(f"{_sets(len(removed))}, {size}, {verb}; {_size(kept_bytes)} kept")


def _entries(cache: Path) -> list[_Entry]:
    """Give every bank, the one used last first."""
    from msn_eval.features.cache import list_banks

    entries = []
    for bank in list_banks(cache):
        statuses = _statuses(bank.folder)
        entries.append(
            _Entry(
                bank=bank,
                title=_title(bank),
                bytes=sum(status.st_size for status in statuses),
                used_seconds=max((status.st_mtime for status in statuses), default=time.time()),
            )
        )
    return sorted(entries, key=lambda entry: -entry.used_seconds)


def _title(bank: "Bank") -> str:
    """Say what a bank's features are of."""
    from msn_eval.features.cache import describe_bank

    name, key = describe_bank(bank.folder)
    if not key:
        return f"{name:.{_WIDEST}}"
    transform = key.get("transform")
    pixels = transform.get("crop") if isinstance(transform, dict) else None
    patches = key.get("patches")
    dropped = f", {patches.get('share')} of patches dropped" if isinstance(patches, dict) else ""
    details = f"{key.get('arch')}, tap {key.get('tap')}, {pixels} px, {key.get('precision')} on {key.get('device')}"
    return f"{name:.{_WIDEST}} ({details:.{_WIDEST}}{dropped:.{_WIDEST}})"


def _statuses(folder: Path) -> list[os.stat_result]:
    """Ask for size and time of every file below a folder, following no link; files that vanish meanwhile are none."""
    statuses = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                statuses.append(Path(place, name).lstat())
    return statuses


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(?:([kmgt])(i?))?b?", text.strip().lower())
    if found is None:
        raise UsageError(f"--max-bytes {text}: no size", hint="Give a number of bytes, or 500M, 20G.")
    thousand = 1024 if found[3] else 1000
    return int(Decimal(found[1]) * thousand ** _THOUSANDS[found[2] or ""])


def _size(count: int) -> str:
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _age(used_seconds: float) -> str:
    seconds = max(0.0, time.time() - used_seconds)
    for unit, name in ((_DAY_SECONDS, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"


def _sets(count: int) -> str:
    return f"{count} set{'' if count == 1 else 's'} of features"


def _say(line: str) -> None:
    """Print one line, whatever is in the names that it holds."""
    print(printable(line.replace("\n", "\\x0a").replace("\t", "\\x09")))
