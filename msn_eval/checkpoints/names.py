"""Names of checkpoints: the check that needs neither torch nor timm, so that a typo is reported at once."""

import os
from collections.abc import Iterable

from msn_eval.errors import CheckpointError

_SCHEMES = ("msn", "hf", "timm", "random", "py")


def check_files_exist(names: Iterable[str]) -> None:
    """Check that every name is a file or folder, or has the form of a scheme.

    Raises:
        CheckpointError: Names the file that does not exist.
    """
    for name in names:
        scheme, colon, _ = name.partition(":")
        if name in ("pixels", "demo") or (colon and scheme in _SCHEMES):
            continue
        if not os.path.exists(name):  # noqa: PTH110 - Path.exists raises on names that are too long
            raise CheckpointError(
                "no such checkpoint file or scheme",
                where=name,
                hint='Check the path; "msn-eval ls checkpoints" lists the schemes.',
            )
