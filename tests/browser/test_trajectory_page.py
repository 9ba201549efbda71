"""The page of a pre-training run in a real browser: values at the pointer and both themes, without any request."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from msn_eval.monitor.alarms import find_alarms
from msn_eval.monitor.snapshot_features import ExtractionSettings, SnapshotFeatures
from msn_eval.monitor.trajectory import Point, RunInfo, Trajectory
from msn_eval.reports.html.trajectory import draw_panels, render_page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

_NAME = "<img src=//x.invalid/a onerror=alert(1)></script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of an invented run of 2,000 steps with a hostile name that collapses onto one prototype."""
    lines = [
        {"step": float(step), "epoch": step // 100.0, "loss": 4.0 / step, "me_max": 4.1 if step > 1500 else 0.1}
        for step in range(1, 2001)
    ]
    settings = ExtractionSettings(data_sha256="d", tap="cls-norm", precision="exact")
    snapshots = [
        SnapshotFeatures(step=step, epoch=step // 100, created="", sha256="", weights_sha256=str(step), seen=settings, images=30,
             feature_rank=math.log(step), feature_spread=0.5, problem=_NAME if step == 2000 else "")
        for step in (500, 1000, 2000)
    ]  # fmt: skip
    trajectory = Trajectory(
        run=RunInfo(name=_NAME, method="msn", data="", subset="5imgs", epochs=20, warmup_epochs=1.0, prototypes=64),
        steps_per_epoch=100,
        lines=tuple(lines),
        points=tuple(Point(step=item.step, epoch=item.epoch, features=item, results=()) for item in snapshots),
        alarms=find_alarms(lines, snapshots, prototypes=64, first_epochs=1),
        notices=(_NAME,),
    )
    path = tmp_path_factory.mktemp("trajectory") / "trajectory.html"
    path.write_text(render_page(trajectory, draw_panels(trajectory)))
    return path


def _keys(browser: "webdriver.Chrome") -> list[str]:
    return [key.text for key in browser.find_elements(By.CSS_SELECTOR, ".key b")]


def test_pointer_shows_the_values_of_all_panels_until_it_leaves(opened: "webdriver.Chrome") -> None:
    before = _keys(opened)
    first = opened.find_element(By.CSS_SELECTOR, ".panel svg")
    cursors = "return [...document.querySelectorAll('.cursor')].map((item) => item.getAttribute('visibility'))"

    ActionChains(opened).move_to_element(first).perform()
    at_pointer, shown = _keys(opened), opened.execute_script(cursors)
    ActionChains(opened).move_to_element(opened.find_element(By.TAG_NAME, "h1")).perform()

    assert all(" at epoch " in key for key in at_pointer)
    assert set(shown) == {"visible"}
    assert (_keys(opened), set(opened.execute_script(cursors))) == (before, {"hidden"})


def test_pointer_shows_the_value_under_it(opened: "webdriver.Chrome") -> None:
    rank = opened.find_elements(By.CSS_SELECTOR, ".panel")[1]
    dot = rank.find_elements(By.CSS_SELECTOR, "circle.dot")[1]

    ActionChains(opened).move_to_element(dot).perform()

    assert rank.find_element(By.CSS_SELECTOR, ".key b").text == f"{math.log(1000):.4g} at epoch 10"


def test_alarms_are_listed_and_their_steps_are_shaded(opened: "webdriver.Chrome") -> None:
    alarms = [item.text for item in opened.find_elements(By.CSS_SELECTOR, ".alarms li")]
    shade = opened.find_element(By.CSS_SELECTOR, "rect.alarm").rect
    svg = opened.find_element(By.CSS_SELECTOR, ".panel svg")
    left, right = (float(svg.get_attribute(f"data-{side}")) for side in ("left", "right"))
    scale = svg.rect["width"] / float(svg.get_dom_attribute("viewBox").split()[2])

    assert alarms[0] == "collapse: all images are on one prototype, since step 1,501"
    assert alarms[1] == f"features of a snapshot: {_NAME}, since step 2,000"
    assert 0.72 < ((shade["x"] - svg.rect["x"]) / scale - left) / (right - left) < 0.78


def test_hostile_texts_are_texts(opened: "webdriver.Chrome") -> None:
    assert opened.find_element(By.TAG_NAME, "h1").text == _NAME
    assert opened.find_elements(By.TAG_NAME, "img") == []


@pytest.mark.parametrize("width", [390, 1400])
def test_page_is_no_wider_than_its_window(width: int, opened: "webdriver.Chrome", resize: Callable[..., None]) -> None:
    resize(width=width, mobile=width < 500)

    assert opened.execute_script("return document.documentElement.scrollWidth") == width


def test_theme_is_switched(opened: "webdriver.Chrome") -> None:
    colours = []
    for _ in range(2):
        opened.find_element(By.ID, "theme").click()
        colours.append(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))

    assert colours[0] != colours[1]
