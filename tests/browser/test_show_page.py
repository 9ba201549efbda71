"""The page of pictures in a real browser: the pictures of the theme that is shown, without any request."""

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from msn_eval.commands.show import _render_page
from msn_eval.reports.pictures import as_png

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page with a picture of 900 by 200 pixels for each theme."""
    light, dark = (as_png(Figure(figsize=(9, 2), dpi=100, facecolor=colour)) for colour in ("white", "black"))
    path = tmp_path_factory.mktemp("show") / "show.html"
    path.write_text(_render_page("demo on digits", {"attention": (light, dark)}), encoding="utf-8")
    return path


def test_picture_is_that_of_the_theme(opened: "webdriver.Chrome") -> None:
    shown = []
    for _ in range(2):
        pictures = opened.find_elements(By.CSS_SELECTOR, ".picture img")
        shown.append([item.get_attribute("class") for item in pictures if item.is_displayed()])
        opened.find_element(By.ID, "theme").click()

    assert shown == [["on-light"], ["on-dark"]]


def test_system_theme_chooses_the_picture(opened: "webdriver.Chrome") -> None:
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    shown = [item.is_displayed() for item in opened.find_elements(By.CSS_SELECTOR, ".picture img")]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    assert shown == [False, True]


def test_page_is_no_wider_than_a_phone(opened: "webdriver.Chrome", resize: Callable[..., None]) -> None:
    resize(width=390, mobile=True)

    assert opened.execute_script("return document.documentElement.scrollWidth") == 390
