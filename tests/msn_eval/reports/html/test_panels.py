import re

import pytest

from msn_eval.reports.html.panels import Curve, Extent, Laid, Panel, lay_out, number_text

_EXTENT = Extent(end=100.0, title="step")


def _laid(*values: float | None, levels: tuple[tuple[float, str], ...] = ()) -> Laid:
    places = tuple((100.0 * place / (len(values) - 1), value) for place, value in enumerate(values))
    return lay_out(Panel(title="t", lead="", curves=(Curve(name="c", values=places),), levels=levels), _EXTENT)


def _heights(text: str) -> list[float]:
    return [float(pair.split(",")[1]) for pair in text.split()]


def test_ends_of_the_axis_are_round_and_hold_every_value() -> None:
    laid = _laid(0.13, 0.42, 0.87)

    assert (laid.y_low, laid.y_high) == (0.0, 1.0)
    assert [text for _, text in laid.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_what_is_not_finite_is_a_gap() -> None:
    laid = _laid(1.0, 2.0, None, 2.0, 1.0)

    assert [len(line.split()) for line in laid.curves[0].lines] == [2, 2]


def test_long_curves_are_thinned_and_their_extremes_kept_as_a_band() -> None:
    values = [float(place % 2) for place in range(50_000)]
    curve = _laid(*values).curves[0]

    assert len(curve.lines[0].split()) <= 361
    top, bottom = min(_heights(curve.bands[0])), max(_heights(curve.bands[0]))
    laid = _laid(0.0, 1.0)
    assert (top, bottom) == (laid.top, laid.bottom)


def test_a_single_spike_does_not_flatten_the_curve_and_is_told() -> None:
    laid = _laid(*[1.0 + place % 5 for place in range(100)], 1e6, *[1.0] * 100)

    assert laid.y_high < 100
    assert laid.cut
    assert not _laid(1.0, 2.0, 3.0).cut


def test_a_level_is_drawn_near_the_curve_and_left_out_far_from_it() -> None:
    assert [text for _, text in _laid(2.0, 4.0, levels=((4.5, "near"), (900.0, "far"))).levels] == ["near"]


def test_constant_values_have_an_axis() -> None:
    laid = _laid(3.0, 3.0, 3.0)

    assert laid.y_low < 3.0 < laid.y_high


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (4.158883, "4.159"), (1234567.0, "1.2e+06"), (25000.0, "25,000"), (2e-5, "2e-05")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number_text(value) == text


def test_every_coordinate_lies_within_the_panel() -> None:
    laid = _laid(*[float(place * place) for place in range(1000)])

    numbers = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", laid.curves[0].lines[0])]
    assert all(laid.left <= x <= laid.right and laid.top <= y <= laid.bottom for x, y in numbers)
