"""Report formats: a table of results as text. Reports are made from records alone and need no torch."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from msn_eval.errors import UsageError
from msn_eval.registry import Entry, find_entry, read_registry

if TYPE_CHECKING:
    from msn_eval.results.folder import ResultScan
    from msn_eval.results.table import Table

_FORMATS = (
    Entry(name="md", summary="Markdown tables", target="msn_eval.reports.markdown"),
    Entry(name="csv", summary="one CSV table, percentages with all digits", target="msn_eval.reports.csv_table"),
    Entry(name="tidy", summary="one CSV row per result, with the fields of its record", target="msn_eval.reports.tidy"),
    Entry(name="json", summary="columns, rows and cells, lossless", target="msn_eval.reports.json_table"),
    Entry(name="latex", summary="LaTeX tables with booktabs", target="msn_eval.reports.latex"),
    Entry(name="html", summary="an offline page with charts", target="msn_eval.reports.html.leaderboard"),
)


@runtime_checkable
class ReportFormat(Protocol):
    """A report format: a module, or any object, with a `suffix` and a `render` function.

    A plug-in is a module like this one, in a file `my_package/names.py`:

        suffix = "txt"

        def render(table, scan):
            return "".join(f"{row.name}\\n" for row in table.rows)

    and an entry point in the `pyproject.toml` of its distribution:

        [project.entry-points."msn_eval.reports"]
        names = "my_package.names"

    Then `msn-eval report RUNS --format names --out DIR` writes `DIR/table.txt`. `msn_eval.reports.text_tables` has the texts
    that the built-in formats share, such as `cell_text`, and `msn_eval.results.table` describes rows, columns and cells:
    `table.cells` has no entry for what was not measured. Names of checkpoints, classes and data sets are arbitrary text:
    escape them for your format (`msn_eval.errors.one_line` replaces tabs and line ends).

    Attributes:
        suffix: File name suffix without a dot.
    """

    suffix: str

    def render(self, table: "Table", scan: "ResultScan") -> str:
        """Return the report as text.

        Args:
            table: Rows (checkpoints), columns (protocols) and the cells that exist.
            scan: The records that the table is made from, and their files; predictions are in `.npz` files beside these.
        """


def list_formats() -> dict[str, Entry]:
    """Return the report formats by name, plug-ins included."""
    return read_registry("reports", _FORMATS)


def load_format(name: str) -> ReportFormat:
    """Import the report format called `name`. Raises UsageError if there is none, or if a plug-in is not a report format."""
    entry = find_entry(list_formats(), name, what="report format", option="--format")
    report_format = entry.load()
    if not isinstance(report_format, ReportFormat):
        problem = "is not a report format: it has no suffix or no render function"
        hint = "The docstring of msn_eval.reports.ReportFormat describes both."
        raise UsageError(f"The plug-in {name!r} of {entry.distribution} {problem}", where=entry.target, hint=hint)
    return report_format
