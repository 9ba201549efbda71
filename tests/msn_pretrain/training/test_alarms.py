import json
from pathlib import Path

import pytest

from msn_pretrain.training.alarms import Watched, after_line, after_step, dump_batch, is_collapsed, raised

_HEALTHY = {"feature_spread": 0.6, "feature_rank": 12.0, "output_spread": 0.9}


def _after(steps: list[bool]) -> Watched:
    watched = Watched()
    for finite in steps:
        watched = after_step(watched, finite=finite)
    return watched


def test_three_steps_in_a_row_that_are_not_finite_raise_the_alarm() -> None:
    assert raised(_after([False, False, True, False, False])) is None
    alarm = raised(_after([True, False, False, False]))
    assert alarm is not None
    assert alarm.exit_code == 23


@pytest.mark.parametrize("sick", [{"feature_spread": 0.001}, {"output_spread": 0.001}, {"feature_rank": 1.01}])
def test_ten_lines_in_a_row_that_look_collapsed_raise_the_alarm(sick: dict[str, float]) -> None:
    watched = Watched()
    for _ in range(9):
        watched = after_line(watched, _HEALTHY | sick)
    assert raised(watched) is None
    assert raised(after_line(watched, _HEALTHY)) is None
    assert "collapsed" in str(raised(after_line(watched, _HEALTHY | sick)))


def test_a_healthy_network_is_not_taken_for_a_collapsed_one() -> None:
    assert not is_collapsed(_HEALTHY)


def test_the_images_of_a_bad_step_are_written_down(tmp_path: Path) -> None:
    dump_batch(tmp_path, step=7, rank=1, image_ids=["a/1.png"], facts={"total": float("nan")})

    content = json.loads((tmp_path / "alarms" / "step-00000007-rank-1.json").read_text())
    assert content == {"step": 7, "rank": 1, "facts": {"total": "nan"}, "images": ["a/1.png"]}
