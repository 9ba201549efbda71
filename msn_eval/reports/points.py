"""Numbers of comparisons as people read them: accuracies in percent, differences in points of a percent."""

from msn_eval.results.statistics import Interval, Paired


def percent(accuracy: float) -> str:
    """Give `65.53 %`."""
    return f"{100 * accuracy:.2f} %"


def points(difference: float) -> str:
    """Give a signed difference in points, `-2.03`."""
    return f"{100 * difference:+.2f}"


def p_text(p_value: float) -> str:
    """Give `p = 0.0031`; what a float64 cannot hold is not called zero."""
    return f"p = {p_value:.2g}" if p_value > 0 else "p < 1e-300"


def interval_text(interval: Interval) -> str:
    """Give the ends of a difference's interval, in points."""
    return f"{points(interval.low)} to {points(interval.high)}"


def counts_text(paired: Paired) -> str:
    """Say how many images got worse and better."""
    return f"{paired.lost:,} images lost, {paired.gained:,} gained of {paired.images:,}"
