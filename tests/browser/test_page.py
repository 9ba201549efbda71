"""The page in a real browser: sorting, filtering and records, without any request."""

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from msn_eval import evaluate
from msn_eval.cli import main
from msn_eval.reports.html.leaderboard import render
from msn_eval.reports.html.provenance import format_command
from msn_eval.results.folder import ResultScan, list_results, scan_results
from msn_eval.results.record import read_result, write_result
from msn_eval.results.table import make_table

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

_FILE_HASHES = ("predictions_sha256", "seal")
_HOSTILE = "<img src=//x.invalid/a onerror=alert(1)></script>"


@pytest.fixture(scope="module")
def runs(digits_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return records of the digits, some of ridge with its chosen strength, a hostile name, and a failed draw."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    shutil.copytree(digits_runs, folder)
    evaluate(["pixels"], data="digits", subsets=["1img"], probes=["ridge"], out=folder, device="cpu", no_cache=True)
    for number, result in enumerate(list_results([folder])):
        if result.probe.name != "logistic" or result.metrics is None:
            continue
        checkpoint = replace(result.checkpoint, name=_HOSTILE, weights_sha256="0" * 64)
        metrics = replace(result.metrics, top1=result.metrics.top1 / 2)
        other = replace(result, id=f"{number:016x}", checkpoint=checkpoint, metrics=metrics, predictions=None)
        if (result.split.subset, result.split.draw) == ("2imgs", 3):
            other = replace(other, status="failed", metrics=None, error="it broke")
        write_result(folder, other, None)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert main(["report", str(runs), "--published", "--format", "html", "--out", str(out)]) == 0
    return out / "table.html"


@pytest.fixture
def served(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Return the page's address on a local server, and the paths requested from the server."""
    requested: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code: object = "-", size: object = "-") -> None:
            requested.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=page.parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/table.html", requested
        server.shutdown()


def _names(browser: "webdriver.Chrome") -> list[str]:
    items = browser.find_elements(By.CSS_SELECTOR, "#board tbody tr:not(.hidden) bdi")
    return [item.text for item in items if item.is_displayed()]


def _measured(browser: "webdriver.Chrome") -> list[str]:
    return [name for name in _names(browser) if name in ("pixels", _HOSTILE)]


def _head(browser: "webdriver.Chrome", number: int) -> "webdriver.remote.webelement.WebElement":
    return browser.find_element(By.CSS_SELECTOR, f'#board [data-sort="{number}"]')


def _open_first(browser: "webdriver.Chrome") -> dict[str, object]:
    browser.find_element(By.CSS_SELECTOR, "#board td button").click()
    record: dict[str, object] = json.loads(browser.find_element(By.ID, "record").text)
    return record


def test_sorting_reverses_the_rows_and_states_the_order(opened: "webdriver.Chrome") -> None:
    head = _head(opened, 0)
    before = _measured(opened)

    head.click()

    assert (before, _measured(opened)) == (["pixels", _HOSTILE], [_HOSTILE, "pixels"])
    assert head.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"

    head.click()

    assert (_measured(opened), head.find_element(By.XPATH, "..").get_attribute("aria-sort")) == (before, "descending")

    _head(opened, 1).click()

    assert len(opened.find_elements(By.CSS_SELECTOR, "#board th[aria-sort]:not([aria-sort=none])")) == 1


def test_failed_stays_last_in_both_directions(opened: "webdriver.Chrome") -> None:
    orders = []
    for _ in range(2):
        _head(opened, 1).click()
        orders.append(_measured(opened))

    assert orders == [["pixels", _HOSTILE], ["pixels", _HOSTILE]]
    assert opened.find_element(By.CSS_SELECTOR, "#board td.failed").text == "FAILED"


def test_filter_keeps_and_counts_the_matches(opened: "webdriver.Chrome") -> None:
    opened.find_element(By.ID, "filter").send_keys("ONERROR img")

    assert _measured(opened) == [_HOSTILE]
    assert opened.find_element(By.ID, "shown").text == "1 of 2 checkpoints match."


def test_probes_can_be_hidden(opened: "webdriver.Chrome") -> None:
    opened.execute_script("document.querySelector('[data-group=\"0\"]').click()")

    group = len(opened.find_elements(By.CSS_SELECTOR, "#board thead .g0 [data-sort]"))
    cells = opened.find_elements(By.CSS_SELECTOR, "#board tbody tr:first-child td")
    assert [_head(opened, number).is_displayed() for number in range(group + 1)] == [False] * group + [True]
    assert [cell.is_displayed() for cell in cells[: group + 1]] == [False] * group + [True]


def test_published_rows_are_on_a_switch(opened: "webdriver.Chrome") -> None:
    shown = len(_names(opened))

    opened.execute_script("document.getElementById('published').click()")

    assert (shown > 10, len(_names(opened))) == (True, 2)


def _columns_at(browser: "webdriver.Chrome", selector: str) -> list[tuple[float, float]]:
    """Return left and right of the displayed cells that a selector finds."""
    script = (
        "return [...document.querySelectorAll(arguments[0])].map((item) => item.closest('th, td')).filter("
        "(item) => item.checkVisibility()).map((item) => item.getBoundingClientRect()).map((box) => [box.left, box.right])"
    )
    boxes: list[tuple[float, float]] = browser.execute_script(script, selector)
    return boxes


def test_every_number_is_below_its_header_without_published_columns(opened: "webdriver.Chrome") -> None:
    opened.execute_script("document.getElementById('published').click()")

    heads = _columns_at(opened, "#board thead [data-sort]")
    assert (len(heads), heads[1:]) == (9, _columns_at(opened, "#board tbody tr:first-child td"))


def test_a_number_is_one_click_from_its_record_and_its_command(opened: "webdriver.Chrome", runs: Path) -> None:
    record = _open_first(opened)

    path = runs / f"{record['id']}.json"
    assert record == _without_hashes(path)
    assert opened.find_element(By.ID, "command").text == format_command(read_result(path))


def test_every_record_is_in_the_page_to_the_last_digit(opened: "webdriver.Chrome", runs: Path) -> None:
    records = {}
    for button in opened.find_elements(By.CSS_SELECTOR, "#board td button"):
        opened.execute_script("arguments[0].click()", button)
        for draw in opened.find_elements(By.CSS_SELECTOR, "#draws button"):
            opened.execute_script("arguments[0].click()", draw)
            text = opened.execute_script("return document.getElementById('record').textContent")
            records[json.loads(text)["id"]] = json.loads(text)
        opened.execute_script("document.getElementById('origin').close()")

    ids = [result.id for result in scan_results([runs]).results]
    assert records == {identity: _without_hashes(runs / f"{identity}.json") for identity in ids}


def _without_hashes(path: Path) -> dict[str, object]:
    """Return a record as the page has it."""
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in _FILE_HASHES}


def test_interval_is_shown_at_the_pointer_and_at_the_focus(opened: "webdriver.Chrome") -> None:
    tip = opened.find_element(By.ID, "tip")
    buttons = opened.find_elements(By.CSS_SELECTOR, "#board td button")
    ActionChains(opened).move_to_element(buttons[0]).perform()
    at_pointer = tip.text
    ActionChains(opened).move_to_element(opened.find_element(By.ID, "filter")).perform()
    hidden = not tip.is_displayed()

    opened.execute_script("arguments[0].focus()", buttons[0])
    ActionChains(opened).send_keys(Keys.ARROW_RIGHT).perform()

    assert "95 % interval over test images: " in at_pointer
    assert hidden
    assert opened.switch_to.active_element == buttons[1]
    assert "2imgs" in tip.text


def test_both_themes_are_readable(opened: "webdriver.Chrome") -> None:
    script, colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]", []
    for _ in range(2):
        opened.find_element(By.ID, "theme").click()
        colours.append(opened.execute_script(script))

    assert colours[0] != colours[1]
    assert all(_contrast(*pair) > 7 for pair in colours)


def _contrast(first: str, second: str) -> float:
    """Return the contrast of two colours as defined by the WCAG; 7 is their strictest limit."""

    def luminance(colour: str) -> float:
        channels = [int(channel) / 255 for channel in colour[4:-1].split(",")]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_classes_of_a_protocol_are_listed(opened: "webdriver.Chrome") -> None:
    rows = opened.find_elements(By.CSS_SELECTOR, "#classes tbody tr")

    assert sorted(row.find_element(By.TAG_NAME, "bdi").text for row in rows) == [str(number) for number in range(10)]


def test_a_phone_scrolls_the_table_and_not_the_page_and_names_every_curve(
    opened: "webdriver.Chrome", resize: Callable[..., None]
) -> None:
    resize(width=390, mobile=True)
    width = opened.execute_script("return document.documentElement.scrollWidth")
    keys = [item.text for item in opened.find_elements(By.CSS_SELECTOR, "section > .charts .key span")]
    dots = opened.execute_script(
        "return [...document.querySelectorAll('.charts > figure .dot')].map((item) => item.getBoundingClientRect().right)"
    )

    assert width == 390
    assert set(keys) == {"pixels", _HOSTILE}
    assert 0 < max(dots) < 390


def test_paper_is_white_and_holds_every_column(opened: "webdriver.Chrome", resize: Callable[..., None]) -> None:
    resize(width=1032, height=730)  # A4 across, less its margins
    opened.execute_script("document.documentElement.dataset.theme = 'dark'")
    opened.execute_script("dispatchEvent(new Event('beforeprint'))")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    printed = opened.execute_script(
        "return [getComputedStyle(document.body).backgroundColor, document.querySelector('.bar input').checkVisibility(),"
        " ...[...document.querySelectorAll('table')].map((item) => item.getBoundingClientRect().width)]"
    )
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})

    background, filter_is_there, *widths = printed
    assert (background, filter_is_there) == ("rgb(255, 255, 255)", False)
    assert max(widths) <= 1032


def test_a_served_page_makes_no_further_requests(
    browser: "webdriver.Chrome", served: tuple[str, list[str]], requests: Callable[[], list[str]]
) -> None:
    address, requested = served

    browser.get(address)
    _open_first(browser)

    assert requested == ["/table.html"]
    assert (browser.get_log("browser"), requests()) == ([], [address])


@pytest.fixture(scope="module")
def long_page(digits_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of 130 checkpoints with one record each and different accuracies."""
    scan = scan_results([digits_runs])
    first = next(result for result in scan.results if result.probe.name == "ncm" and result.split.subset == "1img")
    results = []
    for number in range(130):
        checkpoint = replace(first.checkpoint, name=f"network {number}", weights_sha256=f"{number:064x}")
        metrics = first.metrics and replace(first.metrics, top1=number / 797, top5=1.0)
        results.append(replace(first, id=f"{number:016x}", checkpoint=checkpoint, metrics=metrics, predictions=None))
    paths = tuple(digits_runs / f"{item.id}.json" for item in results)
    path = tmp_path_factory.mktemp("long") / "table.html"
    path.write_text(render(make_table(results), ResultScan(results=tuple(results), paths=paths, faults=())))
    return path


@pytest.fixture
def long_opened(browser: "webdriver.Chrome", long_page: Path) -> Iterator["webdriver.Chrome"]:
    browser.get(long_page.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def _shown(browser: "webdriver.Chrome") -> list[str]:
    """Return the names of the rows that are laid out."""
    script = (
        "return [...document.querySelectorAll('#board tbody tr')].filter((item) => item.checkVisibility())"
        ".map((item) => item.querySelector('bdi').textContent)"
    )
    names: list[str] = browser.execute_script(script)
    return names


def _best(first: int, last: int) -> list[str]:
    return [f"network {number}" for number in range(first, last, -1)]


def test_a_hundred_rows_are_laid_out_until_all_are_requested(long_opened: "webdriver.Chrome") -> None:
    button = long_opened.find_element(By.ID, "all")
    before, text = _shown(long_opened), button.text

    button.click()

    assert (before, text) == (_best(129, 29), "Show all 130 rows")
    WebDriverWait(long_opened, 5).until(lambda browser: _shown(browser) == _best(129, -1))
    assert not button.is_displayed()


def test_sorting_many_rows_shows_the_first_of_the_new_order(long_opened: "webdriver.Chrome") -> None:
    _head(long_opened, 0).click()

    assert _shown(long_opened) == [f"network {number}" for number in range(100)]


def test_all_rows_stay_shown_after_sorting(long_opened: "webdriver.Chrome") -> None:
    long_opened.find_element(By.ID, "all").click()
    _head(long_opened, -1).click()

    wanted = [f"network {number}" for number in range(130)]
    assert WebDriverWait(long_opened, 5).until(lambda browser: _shown(browser) == wanted)


def test_filter_matches_rows_that_were_not_laid_out(long_opened: "webdriver.Chrome") -> None:
    long_opened.find_element(By.ID, "filter").send_keys("12")

    assert _shown(long_opened) == [f"network {number}" for number in (*range(129, 119, -1), 112, 12)]
    assert long_opened.find_element(By.ID, "shown").text == "12 of 130 checkpoints match."
