"""A real browser, started once, that reports the errors and requests of pages."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000"),
)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    if not (_CHROMIUM and _DRIVER):
        pytest.skip("no browser: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(_DRIVER)))
    started.get("about:blank")  # instead of the browser's own first page, which loads for a while
    yield started
    started.quit()


@pytest.fixture
def requests(browser: "webdriver.Chrome") -> Callable[[], list[str]]:
    """Return a function that returns the addresses requested since its last call, without those of data and of the browser."""

    def requested() -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "chrome://"))]

    requested()
    return requested


@pytest.fixture
def resize(browser: "webdriver.Chrome") -> Iterator[Callable[..., None]]:
    """Return a function that gives the browser a window of another size until the end of the test."""

    def set_size(*, width: int, height: int = 844, mobile: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield set_size
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def opened(browser: "webdriver.Chrome", page: Path, requests: Callable[[], list[str]]) -> Iterator["webdriver.Chrome"]:
    """Return the browser with the page of the test module; afterwards the page must have had no errors and no requests."""
    browser.get(page.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert requests() == [page.as_uri()]
