"""Text of strangers in Markdown: shown as it is, never acted upon."""

import re
from collections.abc import Sequence

from msn_eval.errors import one_line

_SPECIAL = re.compile(r"([\\`*_<>\[\]|#~&!@$])")


def markdown_text(text: str) -> str:
    """Give `text` on one line with everything escaped that Markdown or HTML in it would mean."""
    return _SPECIAL.sub(r"\\\1", one_line(text))


def markdown_line(cells: Sequence[str]) -> str:
    """Give one row of a table from cells that are escaped already."""
    return "| " + " | ".join(cells) + " |"


def markdown_row(cells: Sequence[str]) -> str:
    """Give one row of a table from plain text."""
    return markdown_line([markdown_text(cell) for cell in cells])
