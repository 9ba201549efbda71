"""`msn-eval subsets list|verify|fetch|draw`: the published ImageNet lists, and draws of any data set."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from msn_eval.data.imagenet_subsets import fetch_lists, find_list, find_user_list_folder, read_publication
from msn_eval.errors import DataError, UsageError, format_count


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify|fetch|draw")
    actions.add_parser("list", help="the published lists and where they were found", allow_abbrev=False)
    actions.add_parser("verify", help="like list; fails where one is missing", allow_abbrev=False)
    fetch = actions.add_parser("fetch", help="download the lists and check them", allow_abbrev=False)
    fetch.add_argument("--to", metavar="DIR", help="default: the user's data folder")
    fetch.add_argument("--url", metavar="URL", help="a mirror of the public repository's files")
    draw = actions.add_parser("draw", help="write the images of one draw as a list", allow_abbrev=False)
    draw.add_argument("--data", metavar="X", help="see `ls datasets`; default $MSN_EVAL_DATA")
    draw.add_argument("--subset", metavar="A", required=True, help="such as 5imgs@1")
    draw.add_argument("--out", metavar="FILE", help="default: stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Run the action."""
    match options.action:
        case "fetch":
            return _fetch(options)
        case "draw":
            return _draw(options)
    return _list(must_be_complete=options.action == "verify")


def _list(*, must_be_complete: bool) -> int:
    missing = []
    for entry in read_publication().lists:
        path = find_list(entry)
        print(f"{entry.subset}@{entry.draw}\t{entry.images} images\tsha256 {entry.sha256[:16]}\t{path or 'not found'}")
        if path is None:
            missing.append(f"{entry.subset}@{entry.draw}")
    if missing and must_be_complete:
        what = format_count(len(missing), "published list was", "published lists were")
        raise DataError(f"{what} not found", hint="Run `msn-eval subsets fetch`.")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    folder = Path(options.to) if options.to else find_user_list_folder()
    for entry, state in fetch_lists(folder, options.url or read_publication().url):
        print(f"{state}\t{folder / entry.path}\t{entry.subset}@{entry.draw}\t{entry.images} images")
    return 0


def _draw(options: argparse.Namespace) -> int:
    from msn_eval.data import find_data_name, read_dataset
    from msn_eval.data.subsets import make_subsets
    from msn_eval.files.atomic import write_atomically

    subsets = make_subsets([options.subset], read_dataset(find_data_name(options.data)).train)
    if len(subsets) != 1:
        raise UsageError(f"{options.subset} has {len(subsets)} draws", hint=f"Choose one: {options.subset}@1.")
    text = "".join(f"{image_id}\n" for image_id in subsets[0].image_ids)
    if options.out is None:
        print(text, end="")
    else:
        write_atomically(Path(options.out), text.encode("utf-8", "surrogateescape"))
    return 0
