"""Fixtures for a real browser: it is started once, and its console messages and requests are recorded."""

import json
import shutil
from collections.abc import Callable, Iterator

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

_CHROMIUM, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000"),
)
Contrast = Callable[[str, str], float]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    if not (_CHROMIUM and _DRIVER):
        pytest.skip("no browser: install chromium and chromium-driver to run these tests")
    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(_DRIVER)))
    started.get("about:blank")  # replaces the browser's start page, which keeps loading resources
    yield started
    started.quit()


@pytest.fixture
def requests(browser: "webdriver.Chrome") -> Callable[[], list[str]]:
    """Return a function that returns the addresses requested since its last call, without data: and chrome:// addresses."""

    def requested() -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        sent = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "chrome://"))]

    requested()
    return requested
