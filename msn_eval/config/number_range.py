"""The range of a number in a recipe, and the one way of refusing what is outside of it."""

import math

from msn_eval.errors import UsageError


def check_range(
    key: str,
    value: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Raise UsageError, by the key's full name, for what is not finite or not within the bounds that are given."""
    if math.isfinite(value) and above < value < below and least <= value <= most:
        return
    bounds = [
        text
        for text, there in (
            (f"above {above:g}", above > -math.inf),
            (f"at least {least:g}", least > -math.inf),
            (f"below {below:g}", below < math.inf),
            (f"at most {most:g}", most < math.inf),
        )
        if there
    ]
    raise UsageError(f"{key}: {value} is out of range", remedy=f"Give a number {' and '.join(bounds)}.")
