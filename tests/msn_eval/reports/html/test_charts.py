import math

import pytest

from msn_eval.reports.html.charts import Chart, ChartData, draw_charts, find_crossings
from msn_eval.reports.html.svg import Series

_TICKS = ((1.0, "1", ""), (2.0, "2", ""), (5.0, "5", ""), (10.0, "10", ""))


def _series(name: str, points: dict[float, float], std: float | None = None) -> Series:
    return Series(name=name, points=tuple(points.items()), stds=(std,) * len(points), texts=("",) * len(points))


def _draw(*series: Series) -> Chart:
    (chart,) = draw_charts([ChartData(title="", x_title="", series=series, ticks=_TICKS)])
    return chart


def test_curves_cross_where_both_are_equal_over_the_logarithm() -> None:
    rising, falling = _series("rising", {1: 0, 100: 40}), _series("falling", {1: 30, 100: 10})

    (crossing,) = find_crossings([rising, falling])

    # 40 t = 30 - 20 t at t = 1/2 of log 100
    assert (crossing.x, crossing.y) == (pytest.approx(10), pytest.approx(20))
    assert (crossing.passing, crossing.passed, crossing.before, crossing.after) == (0, 1, 1, 100)


def test_curves_that_meet_in_a_measured_point_cross_there() -> None:
    (crossing,) = find_crossings([_series("a", {1: 10, 2: 20, 5: 40}), _series("b", {1: 15, 2: 20, 5: 30})])

    assert (crossing.x, crossing.y, crossing.passing) == (2, 20, 0)


def test_curves_that_only_touch_do_not_cross() -> None:
    below, above = _series("below", {1: 10, 2: 20, 5: 10}), _series("above", {1: 15, 2: 20, 5: 30})

    assert find_crossings([below, above]) == find_crossings([above, below]) == []
    assert find_crossings([_series("a", {1: 10, 2: 90}), _series("b", {5: 80, 10: 20})]) == []  # no common range


def test_a_crossing_is_on_both_curves_if_one_lacks_a_point() -> None:
    complete, gap = _series("complete", {1: 0, 10: 50, 100: 60}), _series("gap", {1: 20, 100: 40})

    (crossing,) = find_crossings([complete, gap])

    share = math.log(crossing.x) / math.log(10)
    assert crossing.y == pytest.approx(50 * share) == pytest.approx(20 + 20 * share / 2)


def test_everything_is_drawn_inside_the_axes() -> None:
    chart = _draw(_series("a", {1: 0.0, 10: 100.0}, std=3.0))

    axes, (line,), (band,) = chart.axes, chart.curves[0].lines, chart.curves[0].bands
    points = [tuple(map(float, pair.split(","))) for pair in f"{line} {band}".split()]
    assert all(axes.left <= x <= axes.right and axes.top <= y <= axes.bottom for x, y in points)
    assert [text for _, text in chart.y_ticks] == ["0", "20", "40", "60", "80", "100"]


def test_there_is_no_band_where_a_point_has_no_standard_deviation() -> None:
    points, stds = ((1.0, 10.0), (2.0, 20.0), (10.0, 30.0)), (1.0, 2.0, None)

    partly = _draw(Series(name="a", points=points, stds=stds))
    nowhere = _draw(_series("a", dict(points)))

    assert len(partly.curves[0].bands[0].split()) == 4
    assert nowhere.curves[0].bands == ()


def test_neighbouring_charts_have_the_same_axes() -> None:
    low = ChartData(title="low", x_title="", series=(_series("a", {1: 5.0, 2: 10.0}),), ticks=_TICKS[:2])
    high = ChartData(title="high", x_title="", series=(_series("a", {2: 60.0, 10: 90.0}),), ticks=_TICKS[1:])

    first, second = draw_charts([low, high])

    assert (first.axes, first.x_ticks, first.y_ticks) == (second.axes, second.x_ticks, second.y_ticks)
    assert [text for _, text, _ in first.x_ticks] == ["1", "2", "5", "10"]
    assert (first.axes.y_range[0], first.axes.y_range[1]) == (0, 100)
    assert first.curves[0].markers[1][0] == second.curves[0].markers[0][0]  # x = 2 in both
