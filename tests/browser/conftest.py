"""A real browser, started once, that tells what pages complain of and ask for."""

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
        pytest.skip("no browser: install chromium and chromium-driver to have pages tested in one")
    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(_DRIVER)))
    started.get("about:blank")  # instead of the browser's own first page, which loads its parts for a while
    yield started
    started.quit()


@pytest.fixture
def requests(browser: "webdriver.Chrome") -> Callable[[], list[str]]:
    """Give a function that gives the addresses asked for since it was last called, those of data in the page and of the
    browser's own pages apart."""

    def asked() -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        sent = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "chrome://"))]

    asked()
    return asked
