"""Names of classes for people, where a data set names its classes by codes: WordNet ids, or numbers."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from msn_eval.data.images import reading
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file

_WNID = re.compile(r"n\d{8}")
_FILES = ("words.txt", "classes.txt")


def describe_classes(classes: Sequence[str], folder: Path | None = None) -> tuple[str, ...]:
    """Return a name for each class: that of the data set's own file, else of WordNet for its ids, else the class itself.

    Of several synonyms it is the first, such as `tench` for `n01440764`. Reports have no folder, since they may be written
    where the data set is not.

    Args:
        classes: Classes of a data set.
        folder: Where `words.txt` or `classes.txt` may be: lines `CLASS TAB NAME`; or one name per line, that of class 0 first,
            where the classes are numbers.

    Raises:
        DataError: A file cannot be read.
    """
    names: dict[str, str] = {}
    if any(_WNID.fullmatch(name) for name in classes):
        names |= _read_wordnet()
    for path in () if folder is None else (folder / file for file in _FILES):
        if path.is_file():
            names |= _read_names(path)
    return tuple(names.get(name, name).partition(",")[0].strip() or name for name in classes)


@cache
def _read_wordnet() -> Mapping[str, str]:
    """Read timm's list of WordNet names. Importing timm, and with it torch, would take seconds."""
    timm = importlib.util.find_spec("timm")
    folders = [] if timm is None else [Path(folder) for folder in timm.submodule_search_locations or ()]
    paths = [folder / "data" / "_info" / "imagenet_synset_to_lemma.txt" for folder in folders]
    return next((_read_names(path) for path in paths if path.is_file()), {})


def _read_names(path: Path) -> Mapping[str, str]:
    with reading(path):
        text = read_regular_file(path, most_bytes=MOST_TEXT_BYTES).decode("utf-8-sig", "replace")
    lines = text.splitlines()
    if any("\t" in line for line in lines):
        rows = (line.partition("\t") for line in lines)
        return {name.strip(): words.strip().strip('"') for name, _, words in rows}
    return {str(number): line.strip() for number, line in enumerate(lines)}
