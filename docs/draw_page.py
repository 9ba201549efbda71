r"""Draw docs/page.png for the README: the HTML report of four checkpoints as Chromium shows it.

    msn-eval --checkpoint demo --checkpoint random:demo --checkpoint pixels \
        --checkpoint 'random:vit_tiny_patch16_224?img_size=32&patch_size=4' --data digits \
        --subset 1img,2imgs,5imgs,1pct,10pct,full --probe logistic,knn,ncm --k 10 --device cpu --out RUNS
    python docs/draw_page.py RUNS
"""

import shutil
import sys
import tempfile
from pathlib import Path

from selenium import webdriver

from msn_eval.reports.html.leaderboard import render
from msn_eval.results.folder import scan_results
from msn_eval.results.leaderboard import make_leaderboard
from msn_eval.results.table import make_table

_ROOT = Path(__file__).parents[1]
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1290"),
)


def main() -> None:
    """Render the report of the given result folders and save a screenshot of 1280 by 1290 pixels."""
    scan = scan_results(sys.argv[1:])
    page = render(make_table(scan.results, standings=make_leaderboard(scan).standings), scan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        options = webdriver.ChromeOptions()
        for flag in (*_FLAGS, f"--user-data-dir={folder}/profile"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            browser.get(path.as_uri())
            browser.save_screenshot(str(_ROOT / "docs" / "page.png"))
        finally:
            browser.quit()


if __name__ == "__main__":
    main()
