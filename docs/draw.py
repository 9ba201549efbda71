"""Draw docs/demo.svg and docs/page.png for the README, after they have been evaluated on the digits.

    python docs/draw.py

It needs Chromium, its driver and selenium, and takes a few minutes.
"""

import io
import re
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from selenium import webdriver

from msn_eval import evaluate
from msn_eval.commands.demo import CHECKPOINTS
from msn_eval.reports.html.leaderboard import render
from msn_eval.reports.terminal import print_table
from msn_eval.results.folder import scan_results
from msn_eval.results.leaderboard import make_leaderboard
from msn_eval.results.table import make_table

_DOCS = Path(__file__).parent
_COLUMNS = 100  # of the terminal in the README
_SMALL_VIT = "random:vit_tiny_patch16_224?img_size=32&patch_size=4"
_SUBSETS = ["1img", "2imgs", "5imgs", "1pct", "10pct", "full"]
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def main() -> None:
    """Evaluate in a temporary folder, and draw both pictures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_demo(folder / "demo")
        draw_page(folder)


def draw_demo(runs: Path) -> None:
    """Save the tables of `msn-eval demo` as a terminal shows them."""
    results = evaluate(list(CHECKPOINTS), data="digits", probes=["logistic", "knn"], device="cpu", out=runs)
    console = Console(record=True, width=_COLUMNS, highlight=False, file=io.StringIO(), force_terminal=True)
    print_table(make_table(results), console)
    picture = console.export_svg(title="msn-eval demo", unique_id="demo")
    # Without the fonts that the picture would load from a network.
    picture = re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    (_DOCS / "demo.svg").write_text(picture, encoding="utf-8")


def draw_page(folder: Path) -> None:
    """Save the HTML report of four checkpoints as Chromium shows it."""
    runs, path = folder / "runs", folder / "page.html"
    evaluate(
        [*CHECKPOINTS, _SMALL_VIT], data="digits", subsets=_SUBSETS, probes=["logistic", "knn", "ncm"], k=[10],
        device="cpu", out=runs,
    )  # fmt: skip
    scan = scan_results([runs])
    path.write_text(
        render(make_table(scan.results, standings=make_leaderboard(scan).standings), scan), encoding="utf-8"
    )
    options = webdriver.ChromeOptions()
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": 1280, "height": 1210, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        browser.save_screenshot(str(_DOCS / "page.png"))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
