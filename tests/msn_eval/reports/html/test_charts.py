import math
from itertools import pairwise

import pytest

from msn_eval.reports.html.charts import Line, Point, draw_chart, find_crossings

_TICKS = [(1.0, "1", ""), (2.0, "2", ""), (5.0, "5", ""), (10.0, "10", "")]


def _line(name: str, points: dict[float, float], std: float | None = None) -> Line:
    return Line(name=name, points=tuple(Point(x=x, mean=y, std=std, text="") for x, y in points.items()))


def test_lines_cross_where_both_are_equal_over_the_logarithm() -> None:
    rising, falling = _line("rising", {1: 0, 100: 40}), _line("falling", {1: 30, 100: 10})

    (crossing,) = find_crossings([rising, falling])

    # 40 t = 30 - 20 t at t = 1/2 of log 100
    assert (crossing.x, crossing.y) == (pytest.approx(10), pytest.approx(20))
    assert (crossing.passing, crossing.passed, crossing.before, crossing.after) == (0, 1, 1, 100)


def test_lines_that_meet_in_a_measured_point_cross_there() -> None:
    (crossing,) = find_crossings([_line("a", {1: 10, 2: 20, 5: 40}), _line("b", {1: 15, 2: 20, 5: 30})])

    assert (crossing.x, crossing.y, crossing.passing) == (2, 20, 0)


def test_lines_that_only_touch_do_not_cross() -> None:
    below, above = _line("below", {1: 10, 2: 20, 5: 10}), _line("above", {1: 15, 2: 20, 5: 30})

    assert find_crossings([below, above]) == find_crossings([above, below]) == []


def test_a_crossing_lies_on_both_lines_where_one_lacks_a_point() -> None:
    whole, gap = _line("whole", {1: 0, 10: 50, 100: 60}), _line("gap", {1: 20, 100: 40})

    (crossing,) = find_crossings([whole, gap])

    share = math.log(crossing.x) / math.log(10)
    assert crossing.y == pytest.approx(50 * share) == pytest.approx(20 + 20 * share / 2)


def test_lines_without_a_common_range_do_not_cross() -> None:
    assert find_crossings([_line("a", {1: 10, 2: 90}), _line("b", {5: 80, 10: 20})]) == []


@pytest.mark.parametrize("level", [0, 50, 99])
def test_labels_never_cover_each_other_and_keep_their_order(level: float) -> None:
    lines = [_line(f"c{number}", {1: 0 if level else 100, 10: level + number / 10}) for number in range(8)]

    chart = draw_chart(lines, ticks=_TICKS, title="", x_title="", most_crossings=9)

    places = [line.label_y for line in chart.lines]
    assert places == sorted(places, reverse=True)  # the highest accuracy stands highest, which is the smallest y
    assert min(a - b for a, b in pairwise(places)) >= 16.9
    assert min(places) >= chart.top
    assert max(places) <= chart.bottom


def test_everything_is_drawn_inside_the_axes() -> None:
    chart = draw_chart([_line("a", {1: 0.0, 10: 100.0}, std=3.0)], ticks=_TICKS, title="", x_title="", most_crossings=9)

    points = [tuple(map(float, pair.split(","))) for pair in chart.lines[0].path.split()]
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in points)
    assert [text for _, text in chart.y_ticks] == ["0", "20", "40", "60", "80", "100"]


def test_one_draw_has_no_band() -> None:
    chart = draw_chart([_line("a", {1: 10, 2: 20})], ticks=_TICKS, title="", x_title="", most_crossings=9)

    assert chart.lines[0].band == ""


def test_a_long_name_keeps_both_its_ends() -> None:
    name = "random:vit_tiny_patch16_224?img_size=32&patch_size=4"

    chart = draw_chart([_line(name, {1: 10})], ticks=_TICKS, title="", x_title="", most_crossings=9)

    label = chart.lines[0].label
    assert (len(label), label[:7], label[-6:], chart.lines[0].name) == (20, "random:", "size=4", name)
