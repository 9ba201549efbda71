"""Draw docs/demo.svg for the README: the tables of `msn-eval demo` as a terminal shows them.

msn-eval demo --out reports/demo && python docs/draw_demo.py
"""

import io
from pathlib import Path

from rich.console import Console

from msn_eval.reports.terminal import print_table
from msn_eval.results.folder import list_results
from msn_eval.results.table import make_table

_ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print the demo's tables to a recording console and save them as SVG."""
    console = Console(record=True, width=172, highlight=False, file=io.StringIO(), force_terminal=True)
    print_table(make_table(list_results([_ROOT / "reports" / "demo" / "runs"])), console)
    console.save_svg(str(_ROOT / "docs" / "demo.svg"), title="msn-eval demo", unique_id="demo")


if __name__ == "__main__":
    main()
