"""Reference file: a YAML file of the MSN authors' repository, taken apart into the keys that their code reads.

Source: github.com/facebookresearch/msn.
"""

from collections.abc import Collection, Mapping
from typing import Any

from msn_eval.errors import UsageError, nearest


def is_reference(content: Mapping[str, object]) -> bool:
    """Tell whether a YAML file is laid out as the authors' are: it has their section `meta`, and ours have none."""
    return "meta" in content


def read_keys(
    content: Mapping[str, Any], *, known: Collection[str], defaults: Mapping[str, object], reader: str, where: str
) -> dict[str, Any]:
    """Give `section.key` and value for all known keys.

    known:    all that the authors' code reads, as `section.key`
    defaults: what it takes where the file is silent
    reader:   what to call that code in errors
    Raises UsageError naming a section or key that is unknown, or those that are missing.
    """
    sections = sorted({key.partition(".")[0] for key in known})
    given: dict[str, Any] = {}
    for section, values in content.items():
        if section not in sections or not isinstance(values, Mapping):
            raise UsageError(
                f"{section!r} is no section of the MSN repository's files.{nearest(section, sections)}",
                where=where,
                remedy=f"Known: {', '.join(sections)}. A file of ours has no section `meta`.",
            )
        given |= {f"{section}.{key}": value for key, value in values.items()}
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None:
        raise UsageError(
            f"unknown key {unknown!r}.{nearest(unknown, known)}",
            where=where,
            remedy=f"The {reader} of the MSN repository does not read it either: take it out.",
        )
    given = {**defaults, **given}
    missing = [key for key in known if key not in given]
    if missing:
        raise UsageError(
            f"lacks {', '.join(missing)}", where=where, remedy="The code of the MSN repository needs them, too."
        )
    return given
