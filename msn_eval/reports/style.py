"""The style that all pages and pictures share: colours for light and dark, as CSS and as settings of matplotlib."""

from contextlib import AbstractContextManager
from typing import Literal

Theme = Literal["light", "dark"]
# Each colour on light and on dark. Curves have `s0` to `s7`, in this order.
_COLOURS = {
    "bg": ("#f5f6f8", "#0d1117"),
    "card": ("#ffffff", "#151b23"),
    "ink": ("#17202b", "#e7ecf2"),
    "soft": ("#5a6878", "#95a3b3"),
    "line": ("#e2e6ec", "#28313c"),
    "accent": ("#3b5bdb", "#91a7ff"),
    "good": ("#0b8a6a", "#5ddbb4"),
    "bad": ("#c92a2a", "#ff8787"),
    "warn": ("#8a5a00", "#ffd27a"),
    "warn-bg": ("#fff6e0", "#2b2412"),
    "s0": ("#3b5bdb", "#91a7ff"),
    "s1": ("#e8590c", "#ffa94d"),
    "s2": ("#0b8a6a", "#5ddbb4"),
    "s3": ("#c2255c", "#faa2c1"),
    "s4": ("#7048e8", "#b197fc"),
    "s5": ("#0c8599", "#66d9e8"),
    "s6": ("#846358", "#d0b8ac"),
    "s7": ("#5c7a00", "#c0eb75"),
}


def format_variables() -> str:
    """Return the colours as CSS variables that follow the page's `color-scheme`."""
    colours = (f"--{name}:light-dark({light},{dark})" for name, (light, dark) in _COLOURS.items())
    return f":root{{color-scheme:light dark;{';'.join(colours)}}}\n"


def get_colour(name: str, theme: Theme = "light") -> str:
    """Return a colour, such as `bad` or `s0`, as `#rrggbb`."""
    return _COLOURS[name][theme == "dark"]


def list_curve_colours(theme: Theme = "light") -> list[str]:
    """Return the colours of curves and classes, in their order."""
    return [get_colour(name, theme) for name in _COLOURS if name[1:].isdigit()]


def style_figures(theme: Theme = "light") -> AbstractContextManager[None]:
    """Return a context in which figures are created in the style of the pages."""
    import matplotlib

    card, ink, soft, line = (get_colour(name, theme) for name in ("card", "ink", "soft", "line"))
    return matplotlib.rc_context(
        {
            "figure.facecolor": card,
            "figure.dpi": 110,
            "axes.facecolor": card,
            "axes.edgecolor": line,
            "axes.labelcolor": soft,
            "axes.titlecolor": ink,
            "grid.color": line,
            "text.color": ink,
            "legend.frameon": False,
            "font.size": 9,
        }
    )
