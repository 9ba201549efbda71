"""Report format `tidy`: one CSV row per result, with the fields of its record, for pandas and R."""

import json

from msn_eval.reports.csv_table import escape_csv
from msn_eval.results.folder import ResultScan, make_frame
from msn_eval.results.table import Table

suffix = "tidy.csv"


def render(table: Table, scan: ResultScan) -> str:
    """Return the results as CSV: the row of the table, then the columns of `read_results`; accuracies are fractions."""
    names = {(row.weights_sha256, row.key): row.name for row in table.rows}
    frame = make_frame(scan.results)
    shown = [names[result.checkpoint.weights_sha256, result.checkpoint.key] for result in scan.results]
    frame.insert(0, "row", shown)
    return frame.map(_format_value).to_csv(index=False)


def _format_value(value: object) -> object:
    if isinstance(value, list | tuple):
        return json.dumps(value)
    return escape_csv(value) if isinstance(value, str) else value
