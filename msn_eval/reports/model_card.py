"""Model card of Hugging Face: the results of one checkpoint as `model-index` metadata and as a table."""

from collections.abc import Iterator, Sequence

from msn_eval.errors import UsageError, one_line
from msn_eval.reports.text_tables import (
    describe_row,
    explain_cells,
    format_accuracy,
    format_convergence_mark,
    markdown_row,
    markdown_text,
)
from msn_eval.results.record import Result
from msn_eval.results.table import Cell, Column, Table, make_table
from msn_eval.version import __version__

MARK = "<!-- written by msn-eval card -->"
_HEADER = ("probe and data set", "labelled images", "top-1 accuracy, %", "draws", "protocol id")


def render_model_card(results: Sequence[Result]) -> str:
    """Render the card. Metadata have accuracies as fractions, the table in percent; each number has its protocol id.

    Args:
        results: Results of one checkpoint.

    Raises:
        UsageError: No result has a number.
    """
    from huggingface_hub import EvalResult, ModelCardData

    table = make_table(results)
    cells = list(_list_cells(table))
    entries = [
        EvalResult(
            task_type="image-classification",
            task_name="Low-shot image classification, frozen backbone",
            dataset_type=one_line(column.data),
            dataset_name=one_line(column.data),
            dataset_config=one_line(column.subset),
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=one_line(f"top-1 accuracy, {column.group}, {column.title} [{column.protocol_id}]"),
            metric_value=cell.mean,
            metric_args={
                "protocol_id": column.protocol_id,
                "draws": cell.draws,
                "std": cell.std,
                "status": cell.status,
            },
        )
        for column, cell in cells
        if cell.mean is not None
    ]
    if not entries:
        hint = "Measure the checkpoint again: its records say why there is no result."
        raise UsageError("no result of this checkpoint has a number", hint=hint)
    name, checkpoint = one_line(table.rows[0].name), results[0].checkpoint
    data = ModelCardData(
        model_name=name, eval_results=entries, tags=["msn-eval"], pipeline_tag="image-feature-extraction"
    )
    lines = [
        MARK,
        "",
        f"# {markdown_text(name)}",
        "",
        f"{markdown_text(f'{describe_row(table.rows[0])}: {checkpoint.arch}')}, {checkpoint.params:,} parameters, SHA-256 of "
        f"the weights `{checkpoint.weights_sha256}`. Measured by msn-eval {__version__} on the frozen backbone.",
        "",
        markdown_row(_HEADER),
        "| --- | --- | ---: | ---: | --- |",
        *(markdown_row(_make_row(column, cell)) for column, cell in cells),
        "",
        "  \n".join(map(markdown_text, explain_cells(table, draws=""))),
        "Two numbers are comparable only if their protocol ids are equal.",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _list_cells(table: Table) -> Iterator[tuple[Column, Cell]]:
    """Yield the cells of a table with one row, by column."""
    for column in table.columns:
        if (cell := table.cells.get((table.rows[0], column))) is not None:
            yield column, cell


def _make_row(column: Column, cell: Cell) -> list[str]:
    accuracy = f"{format_accuracy(cell)}{format_convergence_mark(cell)}"
    return [column.group, column.title, accuracy, str(cell.draws), column.protocol_id]
