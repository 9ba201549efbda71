"""Text of strangers in Markdown: shown as it is, never acted upon."""

import re

from msn_eval.errors import printable

_SPECIAL = re.compile(r"([\\`*_{}<>\[\]()|#~$@&!])")
_LONGEST = 300


def markdown_text(text: str) -> str:
    """Give `text` on one line with everything escaped that Markdown or HTML in it would mean."""
    shown = " ".join(printable(text).split())
    shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
    return _SPECIAL.sub(r"\\\1", shown).replace("://", ":\u200b//")


def markdown_row(cells: list[str]) -> str:
    """Give one row of a table."""
    return "| " + " | ".join(map(markdown_text, cells)) + " |"
