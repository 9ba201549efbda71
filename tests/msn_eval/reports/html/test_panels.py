import pytest

from msn_eval.reports.html.panels import DrawnPanel, Panel, RunAxis, draw_panel, format_number
from msn_eval.reports.html.svg import Series

_X_AXIS = RunAxis(end=100.0, title="step")


def _draw(*values: float | None, levels: tuple[tuple[float, str], ...] = ()) -> DrawnPanel:
    points = tuple((100.0 * number / (len(values) - 1), value) for number, value in enumerate(values))
    return draw_panel(Panel(title="t", lead="", series=(Series(name="c", points=points),), levels=levels), _X_AXIS)


def _heights(text: str) -> list[float]:
    return [float(pair.split(",")[1]) for pair in text.split()]


def test_ends_of_the_axis_are_round_and_include_every_value() -> None:
    drawn = _draw(0.13, 0.42, 0.87)
    low, high = _draw(3.0, 3.0, 3.0).axes.y_range

    assert low < 3.0 < high
    assert drawn.axes.y_range == (0.0, 1.0)
    assert [text for _, text in drawn.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]


def test_a_number_that_is_not_finite_is_a_gap() -> None:
    drawn = _draw(1.0, 2.0, None, 2.0, 1.0)

    assert [len(line.split()) for line in drawn.curves[0].lines] == [2, 2]


def test_long_curves_are_thinned_and_their_extremes_kept_as_a_band() -> None:
    drawn = _draw(*[float(number % 2) for number in range(50_000)])
    curve = drawn.curves[0]

    assert len(curve.lines[0].split()) <= 361
    top, bottom = min(_heights(curve.bands[0])), max(_heights(curve.bands[0]))
    assert (top, bottom) == (drawn.axes.top, drawn.axes.bottom)


def test_an_outlier_is_cut_off_and_does_not_flatten_the_curve() -> None:
    drawn = _draw(*[1.0 + number % 5 for number in range(100)], 1e6, *[1.0] * 100)

    assert drawn.axes.y_range[1] < 100
    assert drawn.is_cut
    assert not _draw(1.0, 2.0, 3.0).is_cut


def test_a_level_is_only_drawn_near_the_curve() -> None:
    assert [text for *_, text in _draw(2.0, 4.0, levels=((4.5, "near"), (900.0, "far"))).levels] == ["near"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (4.158883, "4.159"), (1234567.0, "1.2e+06"), (25000.0, "25,000"), (2e-5, "2e-05")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text
