"""Low-shot evaluation of frozen vision checkpoints.

Public names are imported on first use: `import msn_eval` alone loads neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from msn_eval.version import __version__

if TYPE_CHECKING:
    from msn_eval.api import evaluate
    from msn_eval.features.encoder import load_encoder
    from msn_eval.features.extraction import extract
    from msn_eval.results.folder import read_results

__all__ = ["__version__", "evaluate", "extract", "load_encoder", "read_results"]

_HOMES = {
    "evaluate": "msn_eval.api",
    "extract": "msn_eval.features.extraction",
    "load_encoder": "msn_eval.features.encoder",
    "read_results": "msn_eval.results.folder",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'msn_eval' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
