"""The page in a real browser: sorting, filtering and records, without any request."""

import csv
import http.server
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from msn_eval import evaluate
from msn_eval.cli import main
from msn_eval.reports.html.leaderboard import render
from msn_eval.reports.html.provenance import format_command
from msn_eval.results.folder import ResultScan, list_results, scan_results
from msn_eval.results.record import protocol_id, read_result, write_result
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


def _check_columns(browser: "webdriver.Chrome", count: int) -> None:
    """Check that `count` columns are shown, each number below its header and each header below its group."""
    heads = _columns_at(browser, "#board thead [data-sort]")[1:]
    groups = _columns_at(browser, "#board thead th.group span")
    assert (len(heads), heads) == (count, _columns_at(browser, "#board tbody tr:not(.hidden) td")[:count])
    assert {left for left, _ in groups} <= {left for left, _ in heads}
    assert (groups[0][0], groups[-1][1]) == (heads[0][0], heads[-1][1])


def test_every_number_is_below_its_header_without_published_columns(opened: "webdriver.Chrome") -> None:
    opened.execute_script("document.getElementById('published').click()")

    _check_columns(opened, 8)


def _legend(browser: "webdriver.Chrome") -> list[str]:
    return [item.text for item in browser.find_elements(By.CSS_SELECTOR, ".legend span") if item.is_displayed()]


def test_legend_explains_what_is_shown_and_nothing_else(opened: "webdriver.Chrome") -> None:
    opened.execute_script("document.getElementById('published').click()")
    both = _legend(opened)
    opened.find_element(By.ID, "filter").send_keys("onerror")
    other = _legend(opened)
    opened.execute_script("document.querySelector('[data-group=\"0\"]').click()")

    missing, failed = "– not measured", "FAILED a draw produced no result"
    assert both == [missing, failed, "shade: from the lowest to the highest of a column"]
    assert (other, _legend(opened)) == ([missing, failed], [missing])


def test_rows_and_columns_shown_are_copied_as_csv(opened: "webdriver.Chrome", runs: Path) -> None:
    opened.execute_script("addEventListener('copy', () => { window.copied = document.activeElement.value; })")
    opened.execute_script("document.getElementById('published').click()")
    opened.execute_script("document.querySelector('[data-group=\"0\"]').click()")
    _head(opened, -1).click()
    opened.find_element(By.ID, "copy-table").click()

    head, *rows = csv.reader(io.StringIO(opened.execute_script("return window.copied")))
    table = make_table(list_results([runs]))
    shown = [column for column in table.columns if column.probe != "logistic"]
    fields = ("top1 %", "std %", "draws", "status")
    assert head == ["checkpoint", *(f"{column.group}, {column.title}: {field}" for column in shown for field in fields)]
    assert [row[0] for row in rows] == sorted(_measured(opened)) == [_HOSTILE, "pixels"]
    (row,) = [row for row in table.rows if row.name == "pixels"]
    for number, column in enumerate(shown):
        cell, (mean, std, draws, status) = table.cells[row, column], rows[1][1 + 4 * number : 5 + 4 * number]
        assert float(mean) == pytest.approx(100 * (cell.mean or 0), abs=1e-5)
        assert (std and float(std)) == ("" if cell.std is None else pytest.approx(100 * cell.std, abs=1e-4))
        assert (int(draws), status) == (cell.draws, "ok")
    assert set(rows[0][1:]) == {""}


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
    keys = [item.text for item in opened.find_elements(By.CSS_SELECTOR, ".row > .charts .key span")]
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


_FORMULA = "=1+1"


@pytest.fixture(scope="module")
def data_page(digits_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of pixels on the digits, and of that and of a second checkpoint by ncm on `photos`."""
    scan = scan_results([digits_runs])
    results, paths = list(scan.results), list(scan.paths)
    for result, path in zip(scan.results, scan.paths, strict=True):
        for number, name in enumerate(("pixels", _FORMULA) if result.probe.name == "ncm" else ()):
            protocol = {**result.protocol, "data": {**dict(result.protocol["data"]), "sha256": "f" * 64}}
            weights = str(number) * 64 if number else result.checkpoint.weights_sha256
            results.append(
                replace(
                    result,
                    id=f"{len(results):016x}",
                    protocol_id=protocol_id(protocol),
                    protocol=protocol,
                    data=replace(result.data, name="photos", sha256="f" * 64),
                    split=replace(result.split, subset=result.split.subset.replace("2imgs", "20pct")),
                    checkpoint=replace(result.checkpoint, name=name, weights_sha256=weights),
                    predictions=None,
                    predictions_sha256=None,
                )
            )
            paths.append(path.with_name(f"{results[-1].id}.json"))
    page = tmp_path_factory.mktemp("data") / "table.html"
    page.write_text(
        render(make_table(results), ResultScan(results=tuple(results), paths=tuple(paths), faults=())), encoding="utf-8"
    )
    return page


@pytest.fixture
def data_opened(
    browser: "webdriver.Chrome", data_page: Path, requests: Callable[[], list[str]]
) -> Iterator["webdriver.Chrome"]:
    browser.get("about:blank")
    browser.get(data_page.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert {address.partition("#")[0] for address in requests()} <= {data_page.as_uri(), "about:blank"}


def _choose_data(browser: "webdriver.Chrome", name: str) -> None:
    select = browser.find_element(By.ID, "data-set")
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
    browser.execute_script(script, select, name)


def _visible(browser: "webdriver.Chrome", selector: str) -> list[str]:
    script = (
        "return [...document.querySelectorAll(arguments[0])].filter((item) => item.checkVisibility())"
        ".map((item) => item.textContent)"
    )
    texts: list[str] = browser.execute_script(script, selector)
    return texts


def test_data_sets_are_those_of_the_page(data_opened: "webdriver.Chrome") -> None:
    options = data_opened.find_elements(By.CSS_SELECTOR, "#data-set option")

    assert [option.text for option in options] == ["all", "digits", "photos"]


@pytest.mark.parametrize(("name", "columns", "rows"), [("digits", 7, ["pixels"]), ("photos", 2, ["pixels", _FORMULA])])
def test_chosen_data_set_is_all_that_is_shown(
    name: str, columns: int, rows: list[str], data_opened: "webdriver.Chrome"
) -> None:
    everything = _visible(data_opened, ".row > h3")

    _choose_data(data_opened, name)

    assert set(everything) == {"digits", "photos"}
    _check_columns(data_opened, columns)
    assert sorted(_names(data_opened)) == sorted(rows)
    assert set(_visible(data_opened, ".row > h3")) == {name}
    assert data_opened.find_element(By.ID, "classes").is_displayed() == (name == "digits")


def test_page_has_no_choice_of_a_single_data_set(long_opened: "webdriver.Chrome") -> None:
    assert long_opened.find_elements(By.ID, "data-set") == []


def _view(browser: "webdriver.Chrome") -> list[object]:
    """Return what is shown of the leaderboard, and by what it is sorted."""
    sorted_by = "const item = document.querySelector('#board th[aria-sort]:not([aria-sort=none])');"
    state = browser.execute_script(f"{sorted_by} return [item.textContent, item.getAttribute('aria-sort')]")
    return [_names(browser), _visible(browser, "#board thead [data-sort]"), state]


def test_address_restores_what_is_shown(data_opened: "webdriver.Chrome", data_page: Path) -> None:
    before = _view(data_opened)
    _choose_data(data_opened, "photos")
    data_opened.find_element(By.ID, "filter").send_keys("1 =")
    cell = next(item for item in data_opened.find_elements(By.CSS_SELECTOR, "#board td") if item.is_displayed())
    column = cell.get_property("cellIndex") - 1
    _head(data_opened, column).click()
    _head(data_opened, column).click()
    view, address = _view(data_opened), data_opened.current_url

    data_opened.get("about:blank")
    data_opened.get(address)

    assert view[0] == [_FORMULA]
    assert view[2][1] == "ascending"  # type: ignore[index]
    assert _view(data_opened) == view
    assert data_opened.find_element(By.ID, "filter").get_attribute("value") == "1 ="

    data_opened.execute_script("location.hash = ''")

    WebDriverWait(data_opened, 5).until(lambda browser: _view(browser) == before)


def test_unknown_address_shows_the_page_as_it_is(browser: "webdriver.Chrome", data_page: Path) -> None:
    browser.get("about:blank")
    browser.get(data_page.as_uri())
    before = _view(browser)
    browser.get("about:blank")

    browser.get(f"{data_page.as_uri()}#sort=0123456789abcdef.ascending&data=none&without=none&published=7&x")

    assert _view(browser) == before
    assert browser.get_log("browser") == []


def test_text_that_a_spreadsheet_takes_for_a_formula_is_copied_with_a_quote(data_opened: "webdriver.Chrome") -> None:
    data_opened.execute_script("addEventListener('copy', () => { window.copied = document.activeElement.value; })")
    _choose_data(data_opened, "photos")
    data_opened.find_element(By.ID, "copy-table").click()

    _, *rows = csv.reader(io.StringIO(data_opened.execute_script("return window.copied")))
    assert sorted(row[0] for row in rows) == [f"'{_FORMULA}", "pixels"]


def test_charts_are_at_most_600_pixels_wide_and_neighbours_have_the_same_axes(data_opened: "webdriver.Chrome") -> None:
    script = (
        "return [...document.querySelectorAll('.row')].map((row) => [...row.querySelectorAll('figure > svg')].map((item) =>"
        " [item.getBoundingClientRect().width, [...item.querySelectorAll('.tick:not(.small)')].map((text) =>"
        " [text.textContent, text.getAttribute('x'), text.getAttribute('y')])]))"
    )
    rows = data_opened.execute_script(script)

    widths = [width for row in rows for width, _ in row]
    assert 0 < max(widths) <= 600
    assert max(len(row) for row in rows) > 1
    assert all(ticks == row[0][1] for row in rows for _, ticks in row)


def test_texts_of_charts_on_a_phone_are_readable_and_apart(
    data_opened: "webdriver.Chrome", resize: Callable[..., None]
) -> None:
    resize(width=390, mobile=True)

    script = (
        "return [...document.querySelectorAll('.row figure > svg')].filter((item) => item.checkVisibility()).map((item) =>"
        " [...item.querySelectorAll('text')].map((text) => [text.getAttribute('class'), ...['left', 'top', 'right', 'bottom',"
        " 'height'].map((side) => text.getBoundingClientRect()[side])]))"
    )
    charts = data_opened.execute_script(script)

    assert charts
    for texts in charts:
        assert {name.split()[0] for name, *_ in texts} == {"tick"}  # nothing is written beside curves
        assert min(height for *_, height in texts) >= 10
        boxes = [box for _, *box, _ in texts]
        assert all(left >= 0 and right <= 390 for left, _, right, _ in boxes)
        overlaps = [
            (a, b)
            for a, b in combinations(boxes, 2)
            if a[0] < b[2] and b[0] < a[2] and a[1] + 2 < b[3] and b[1] + 2 < a[3]
        ]
        assert overlaps == []


@pytest.mark.parametrize("table", ["board", "classes"])
def test_no_header_is_cut_on_a_phone(table: str, opened: "webdriver.Chrome", resize: Callable[..., None]) -> None:
    resize(width=390, mobile=True)
    script = (
        "const table = document.getElementById(arguments[0]), pane = table.parentNode;"
        "pane.scrollLeft = arguments[1]; await new Promise((done) => setTimeout(done, 400));"
        "const frame = pane.getBoundingClientRect(), name = table.querySelector('thead th').getBoundingClientRect().right;"
        "return [frame.right, name, [...table.querySelectorAll('thead [data-sort]')].filter((item) => item.checkVisibility())"
        ".slice(1).map((item) => { const range = document.createRange(); range.selectNodeContents(item); const box = "
        "range.getBoundingClientRect(); return [box.left, box.right]; })]"
    )
    for wanted in (0, 60, 170):
        right, name, heads = opened.execute_script(script, table, wanted)

        seen = [(left, end) for left, end in heads if left < right - 1 and end > name + 1]
        assert seen
        assert all(name - 1 <= left and end <= right + 1 for left, end in seen)
