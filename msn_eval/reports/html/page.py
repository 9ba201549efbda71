"""Offline page: what every page of ours is made with.

Every text comes through Jinja2's escaping or stands in a JSON block in which nothing can end the block; a page's policy lets
no script and no style run but the two whose hashes it names.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from msn_eval.version import __version__

_FOLDER = Path(__file__).parent / "assets"
_FOR_JSON_IN_HTML = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@cache
def environment() -> Any:
    """Give Jinja2 with escaping of everything that is not marked as ours."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )


def render_offline(template: str, *, script: str, styles: Sequence[str], data: object, **facts: object) -> str:
    """Give the page of a template.

    script, styles: files of ours that stand in it, and that alone its policy lets run and look
    data:           what the script reads; facts: what else the template asks for
    """
    from markupsafe import Markup

    code, style = _asset(script), Markup("").join(map(_asset, styles))
    page: str = environment().get_template(template).render(
        facts,
        data=as_block(data),
        script=code,
        style=style,
        script_sha256=_policy_hash(code),
        style_sha256=_policy_hash(style),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )  # fmt: skip
    return page


def _asset(name: str) -> Any:
    """Give a file of ours that stands in the page as it is."""
    from markupsafe import Markup

    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _policy_hash(text: str) -> str:
    """Give the hash by which a policy knows an inline script or style."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def as_block(value: object) -> Any:
    """Give JSON that can stand in a script element: no text in it can end the element or open a comment."""
    from markupsafe import Markup

    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, and \u2028 escaped
    return Markup(text.translate(_FOR_JSON_IN_HTML))
