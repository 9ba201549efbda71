"""A report format: one line per checkpoint with its name."""

from msn_eval.results.folder import ResultScan
from msn_eval.results.table import Table

suffix = "names"


def render(table: Table, scan: ResultScan) -> str:
    """Return the names of the checkpoints, one per line."""
    return "".join(f"{row.name}\n" for row in table.rows)
