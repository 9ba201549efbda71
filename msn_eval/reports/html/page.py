"""Offline pages: one HTML file without any network request.

Every text passes through Jinja's escaping or is in a JSON block that no text can end. The content security policy of a page
allows only the script and the style whose hashes it has.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from msn_eval.errors import printable
from msn_eval.reports.style import format_variables
from msn_eval.version import __version__

_FOLDER = Path(__file__).parent / "assets"
_JSON_IN_HTML = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@cache
def build_environment() -> Any:
    """Return a Jinja environment that escapes every text, and makes it printable."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        # Not `isinstance`: scripts, styles and JSON blocks are Markup, a subclass of str. `isprintable` is the fast path.
        finalize=lambda value: printable(value) if type(value) is str and not value.isprintable() else value,
    )


def render_offline(
    template: str,
    *,
    title: str,
    kicker: str,
    facts: Sequence[str] = (),
    assets: Sequence[str] = (),
    origin: str = "",
    is_dated: bool = True,
    data: object = None,
    **context: object,
) -> str:
    """Return the page of a template that extends `base.html`.

    Args:
        template: File in `assets`.
        title: Of the page.
        kicker: What kind of page it is, above the title.
        facts: Short texts below the title.
        assets: Scripts and styles in `assets` that are put into the page, beside those that all pages have.
        origin: What the page was made from, after the version in the last line.
        is_dated: Whether the last line states the time; without it the same content gives the same bytes.
        data: What the script reads, as JSON.
        **context: Other variables of the template.
    """
    from markupsafe import Markup

    code = _read_assets(["theme.js", *assets], ".js")
    style = format_variables() + _read_assets(["page.css", *assets], ".css")
    context |= {"title": title, "kicker": kicker, "facts": facts, "origin": origin}
    context |= {"script": Markup(code), "script_sha256": _policy_hash(code)}
    context |= {"style": Markup(style), "style_sha256": _policy_hash(style)}
    time = f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC} " if is_dated else ""
    context |= {"time": time, "version": __version__}
    return str(build_environment().get_template(template).render(context, data=format_json_block(data)))


def _read_assets(names: Sequence[str], suffix: str) -> str:
    return "".join((_FOLDER / name).read_text(encoding="utf-8") for name in names if name.endswith(suffix))


def _policy_hash(text: str) -> str:
    """Return the hash that a content security policy uses for an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def format_json_block(value: object) -> Any:
    """Return JSON for a script element: no text in it can end the element or open a comment."""
    from markupsafe import Markup

    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, and \u2028 escaped
    return Markup(text.translate(_JSON_IN_HTML))


def make_printable(value: object) -> object:
    """Return a JSON value in which every text is printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(name)): make_printable(inner) for name, inner in value.items()}
    return [make_printable(inner) for inner in value] if isinstance(value, list | tuple) else value
