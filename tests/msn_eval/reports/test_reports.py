"""Every report format: its numbers are those of the records; plug-ins are used like the built-in formats."""

import csv
import io
import json
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from msn_eval.cli import main
from msn_eval.reports import load_format
from msn_eval.reports.html.charts import draw_ranks
from msn_eval.reports.terminal import print_table
from msn_eval.results.data_sets import AverageRow, DataSetAverages
from msn_eval.results.folder import ResultScan, list_results
from msn_eval.results.record import Result, protocol_id, read_result
from msn_eval.results.statistics import Metrics, wilson_interval
from msn_eval.results.table import CellStatistics, Table, get_cell_key, make_table

_RECORD = Path(__file__).parents[2] / "golden" / "records" / "schema-1" / "b39361b67149d6c5.json"


def render(table: Table, name: str) -> str:
    return load_format(name).render(table, ResultScan(results=(), paths=(), faults=()))


@pytest.fixture(scope="module")
def results(digits_runs: Path) -> list[Result]:
    return list_results([digits_runs])


def test_every_header_has_the_images_per_class(results: list[Result]) -> None:
    table = make_table(results)

    assert len(re.findall(r"\d images? per class", render(table, "md"))) == len(table.columns)
    assert render(table, "latex").count("images per class") == len(table.groups())


def test_a_failed_result_is_never_blank_or_zero(results: list[Result]) -> None:
    table = make_table([replace(results[0], status="failed", metrics=None, error="broken")])

    (cell,) = json.loads(render(table, "json"))["rows"][0]["cells"].values()

    assert "| pixels | FAILED |" in render(table, "md")
    assert ",FAILED," in render(table, "csv")
    assert "pixels & \\textbf{FAILED} \\\\" in render(table, "latex")
    assert (cell["mean"], cell["status"]) == (None, "failed")


def test_a_fit_that_did_not_converge_is_marked_in_every_format(results: list[Result]) -> None:
    table = make_table([replace(results[0], status="not_converged")])

    assert "(1)\\*" in render(table, "md")
    assert ",not_converged" in render(table, "csv")
    assert re.search(r"\d\.\d\* \\\\", render(table, "latex"))
    assert '"status": "not_converged"' in render(table, "json")


def test_a_missing_result_is_a_dash(results: list[Result]) -> None:
    logistic = next(result for result in results if result.probe.name == "logistic")
    other = replace(logistic, checkpoint=replace(logistic.checkpoint, name="other", weights_sha256="f" * 64))

    text = render(make_table([*results, other]), "md")

    assert any(line.startswith("| other |") and "–" in line for line in text.splitlines()), text


def test_every_format_has_the_change_on_a_test_set(results: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    own = next(result for result in results if (result.probe.name, result.split.subset) == ("ncm", "2imgs"))
    assert own.metrics is not None
    protocol = {**own.protocol, "data": {"sha256": "e" * 64}, "trained_on": own.data.class_map_sha256}
    data = replace(own.data, name="sketch", sha256="e" * 64, trained_on="digits", trained_classes=10)
    metrics = replace(own.metrics, top1=own.metrics.top1 - 0.03125)
    test = replace(own, id="t", protocol=protocol, protocol_id=protocol_id(protocol), data=data, metrics=metrics)

    table = make_table([own, test])

    assert re.search(r"\(1\) -3\.1 \|$", render(table, "md"), re.MULTILINE)
    assert "{\\scriptsize -3.1}" in render(table, "latex")
    assert "scored on &  & sketch" in render(table, "latex")
    header, row = csv.reader(io.StringIO(render(table, "csv")))
    assert {name: value for name, value in zip(header, row, strict=True) if "change" in name} == {
        "ncm on digits, 2imgs, 2 images per class, on sketch: change %": "-3.125"
    }
    cells = json.loads(render(table, "json"))["rows"][0]["cells"]
    assert [cells[result.protocol_id]["change"] for result in (own, test)] == [None, pytest.approx(-0.03125)]
    print_table(table)
    assert re.search(r"^ +-3\.1 *$", capsys.readouterr().out, re.MULTILINE)


_CELL = re.compile(
    r"(?P<mean>\d+\.\d)(?: ± (?P<std>\d+\.\d))?(?: \((?P<draws>\d+)\))?"
    r"(?: \[(?P<low>\d+\.\d), (?P<high>\d+\.\d)\])?(?: rank (?P<rank>\d+))?"
)


def _markdown_cells(table: Table) -> list[str]:
    lines = [line for line in render(table, "md").splitlines() if line.startswith("| c")]
    return [cell for line in lines if "checkpoint" not in line for cell in line.strip("| ").split(" | ")[1:]]


def _latex_cells(table: Table) -> list[str]:
    body = re.sub(r"\\textbf\{([\d.]+)\}", r"\1", render(table, "latex")).replace("$\\pm$", "±")
    body = re.sub(r"\{\\scriptsize (?:\{\})?(.*?)\}", r"\1", body)
    lines = [line.removesuffix(" \\\\").split(" & ") for line in body.splitlines()]
    ((_, draws),) = [line for line in lines if line[0] == "draws"]
    return [
        f"{cell} ({draws}) {details}"
        for line, below in pairwise(lines)
        if re.fullmatch(r"c\d+", line[0])
        for cell, details in zip(line[1:], below[1:], strict=True)
    ]


def _terminal_cells(table: Table) -> list[str]:
    written = io.StringIO()
    print_table(table, Console(file=written, width=10_000))
    lines = [re.split(r"\s{2,}", f"  {line.strip()}") for line in written.getvalue().splitlines()]
    ((_, _, draws),) = [line for line in lines if line[1] == "draws"]
    return [
        f"{cell} ({draws}) {details}"
        for line, below in pairwise(lines)
        if re.fullmatch(r"c\d+", line[1])
        for cell, details in zip(line[2:], below[1:], strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(right=st.lists(st.tuples(*[st.integers(0, 797)] * 3), min_size=1, max_size=4, unique=True))
def test_every_number_of_every_format_is_that_of_the_records(right: list[tuple[int, int, int]]) -> None:
    record = read_result(_RECORD)
    draws = [replace(record, split=replace(record.split, draw=draw), id=f"{draw:016x}") for draw in (1, 2, 3)]
    results = [
        replace(
            result,
            checkpoint=replace(result.checkpoint, name=f"c{number}", weights_sha256=f"{number:064x}"),
            metrics=Metrics(top1=count / 797, top5=1.0, top1_ci95=wilson_interval(count, 797), n=797),
        )
        for number, counts in enumerate(right)
        for result, count in zip(draws, counts, strict=True)
    ]
    standings = {
        get_cell_key(result): CellStatistics(
            interval=result.metrics and result.metrics.top1_ci95, rank=int(result.checkpoint.name[1:]) + 1
        )
        for result in results
    }
    table = make_table(results, standings=standings)
    expected = []
    for row in table.rows:
        scores = [count / 797 for count in right[int(row.name[1:])]]
        interval = wilson_interval(round(scores[-1] * 797), 797)
        expected.append((statistics.fmean(scores), statistics.stdev(scores), *interval, 3, int(row.name[1:]) + 1))

    for cells in (_markdown_cells(table), _latex_cells(table), _terminal_cells(table)):
        for cell, (*numbers, count, rank) in zip(cells, expected, strict=True):
            match = _CELL.fullmatch(cell)
            assert match is not None, cell
            assert list(match.groups()) == [*(f"{100 * value:.1f}" for value in numbers[:2]), str(count),
                                            *(f"{100 * value:.1f}" for value in numbers[2:]), str(rank)]  # fmt: skip
    for line, numbers in zip([*csv.reader(io.StringIO(render(table, "csv")))][1:], expected, strict=True):
        assert [Decimal(field) for field in line[5:9]] == [Decimal(repr(number)) * 100 for number in numbers[:4]]
        assert line[9:] == [str(numbers[4]), str(numbers[5]), "ok"]
    for content, numbers in zip(json.loads(render(table, "json"))["rows"], expected, strict=True):
        (cell,) = content["cells"].values()
        assert (cell["mean"], cell["std"], *cell["interval95"], cell["draws"], cell["rank"]) == numbers
        assert cell["results"] == [result.id for result in draws]


def test_the_terminal_is_not_wrapped_when_piped(results: list[Result], capsys: pytest.CaptureFixture[str]) -> None:
    named = [replace(result, checkpoint=replace(result.checkpoint, name="n" * 300)) for result in results]

    print_table(make_table(named))

    assert "n" * 300 in capsys.readouterr().out


def test_a_plug_in_format_is_listed_and_used_like_the_built_in_ones(
    digits_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names_report.py").write_text(
        "suffix = 'txt'\ndef render(table, scan): return f'{table.rows[0].name} {len(scan.results)}\\n'\n"
    )
    (tmp_path / "names_report-1.0.dist-info").mkdir()
    (tmp_path / "names_report-1.0.dist-info" / "METADATA").write_text("Name: names-report\nVersion: 1.0\n")
    entry_points = tmp_path / "names_report-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text("[msn_eval.reports]\nnames = names_report\nbroken = no_such_module\nother = json\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "latex, html, broken, names, other" in " ".join(capsys.readouterr().out.split())

    assert main(["report", str(digits_runs), "--format", "names"]) == 0
    assert capsys.readouterr().out == f"pixels {len(list_results([digits_runs]))}\n"

    assert main(["report", str(digits_runs), "--format", "names", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.txt"]

    for name, problem in (("broken", "cannot be imported"), ("other", "is not a report format")):
        assert main(["report", str(digits_runs), "--format", name]) == 2
        assert f"The plug-in {name!r} of names-report 1.0 {problem}" in capsys.readouterr().err


def test_requested_measures_are_in_every_format(results: list[Result]) -> None:
    logistic = [result for result in results if result.probe.name in ("logistic", "ncm")]
    table = make_table(logistic, measures=("ece", "rankme"))
    (one, *_) = [column for column in table.columns if column.probe == "logistic"]
    draws = [result for result in logistic if result.protocol_id == one.protocol_id]
    ece = statistics.fmean(result.metrics.ece for result in draws if result.metrics and result.metrics.ece is not None)

    cell = json.loads(render(table, "json"))["rows"][0]["cells"][one.protocol_id]
    row = next(csv.DictReader(io.StringIO(render(table, "csv"))))

    assert (cell["ece"], cell["rankme"]) == (ece, draws[0].features.rankme)
    assert float(row[f"{one.group}, {one.title}: ece"]) == ece
    assert row["ncm on digits, 1img, 1 image per class: ece"] == ""
    for name in ("md", "latex"):
        assert f"ece {ece:.3g} rankme {draws[0].features.rankme:.3g}" in render(table, name)
        assert "ece –" in render(table, "md")
    assert "ece: expected calibration error, 15 bins of equal width." in render(table, "md")
    assert "ece" not in render(make_table(logistic), "md")


_AVERAGES = DataSetAverages(
    title="knn",
    data=("x", "y", "z"),
    rows=tuple(
        AverageRow(name=name, weights_sha256=name * 64, key=None, accuracy=accuracy, rank=rank, groups=groups)
        for name, accuracy, rank, groups in (("a", 0.9, 1.0, "a"), ("b|", 0.5, 2.25, "a b"), ("c", 0.25, 2.75, "b"))
    ),
    left_out=("d",),
    p_value=0.0421,
    ties=((0, 1), (1, 2)),
)


def test_averages_over_data_sets_are_in_markdown_json_and_csv(results: list[Result]) -> None:
    first = replace(results[0], checkpoint=replace(results[0].checkpoint, weights_sha256="a" * 64, key=None))
    table = make_table([first], averages=[_AVERAGES])

    markdown, content = render(table, "md"), json.loads(render(table, "json"))
    row = next(csv.DictReader(io.StringIO(render(table, "csv"))))

    assert "| a | 90.0 | 1.00 | a |\n| b\\| | 50.0 | 2.25 | a b |\n| c | 25.0 | 2.75 | b |" in markdown
    assert "p = 0.042" in markdown
    assert "Left out, as they are not measured on all of them: d." in markdown
    assert content["averages"][0]["p_value"] == 0.0421
    assert [own["rank"] for own in content["averages"][0]["rows"]] == [1.0, 2.25, 2.75]
    fields = {name.rpartition(": ")[2]: value for name, value in row.items() if "over data sets" in name}
    assert fields == {"mean top1 %": "90", "mean rank": "1.0", "groups": "a", "Friedman p": "0.0421"}


def test_averages_over_data_sets_are_in_latex(results: list[Result]) -> None:
    latex = render(make_table(results[:1], averages=[_AVERAGES]), "latex")

    assert "\\textbf{knn: over data sets}" in latex
    assert "checkpoint & mean top-1 \\% & mean rank & groups \\\\\n\\midrule\na & 90.0 & 1.00 & a \\\\\n" in latex
    assert "b\\textbar{} & 50.0 & 2.25 & a b \\\\" in latex
    assert "p = 0.042" in latex


def test_rank_diagram_has_a_mark_per_checkpoint_and_a_bar_per_group(results: list[Result]) -> None:
    page = render(Table(rows=(), columns=(), cells={}, averages=(_AVERAGES,)), "html")
    diagram = draw_ranks(_AVERAGES)

    assert diagram is not None
    assert [(text, is_right) for _, _, is_right, text in diagram.marks] == [
        ("a 1.00", False), ("b| 2.25", False), ("c 2.75", True),
    ]  # fmt: skip
    (first, second, third), (one, other) = [x for x, *_ in diagram.marks], diagram.ties
    assert ((one[0], one[1]), (other[0], other[1])) == ((first, second), (second, third))
    assert (page.count('class="tie"'), page.count('<td class="plain">2.25</td>')) == (2, 1)
    assert draw_ranks(replace(_AVERAGES, p_value=None)) is None


def _many_protocols(results: list[Result], name: str) -> Table:
    """Return a ranked table of two checkpoints under 16 protocols of k-NN: four subsets, four k."""
    knn = next(result for result in results if result.probe.name == "knn")
    made = []
    for subset, k, network in product(("1img", "2imgs", "5imgs", "10pct"), (10, 20, 100, 200), (name, "pixels")):
        params = {"k": k, "temperature": 0.07}
        protocol = {
            **knn.protocol,
            "subset": {"name": subset},
            "probe": {"name": "knn", "version": 1, "params": params},
        }
        made += [
            replace(
                knn,
                id=f"{subset}{k}{network}{draw}",
                protocol=protocol,
                protocol_id=protocol_id(protocol),
                probe=replace(knn.probe, params=params),
                split=replace(knn.split, subset=subset, draw=draw),
                checkpoint=replace(knn.checkpoint, name=network, weights_sha256=network),
            )
            for draw in (1, 2, 3)
        ]
    standing = CellStatistics(interval=(0.1, 0.9), rank=1)
    return make_table(made, standings={get_cell_key(result): standing for result in made})


def test_tables_of_many_protocols_fit_into_100_columns(results: list[Result]) -> None:
    table = _many_protocols(results, "random:vit_tiny_patch4_32")
    written = io.StringIO()

    print_table(table, Console(file=written, width=10_000))

    assert list(table.groups()) == ["knn T=0.07 on digits"]
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[1:] for line in lines if line.startswith("k ")] == [["10", "20", "100"], ["200"]] * 4


def test_terminal_of_80_columns_gets_no_wider_table(results: list[Result]) -> None:
    written = io.StringIO()

    print_table(_many_protocols(results, "demo"), Console(file=written, width=80, force_terminal=True, no_color=True))

    lines = re.sub(r"\x1b\[\d*m", "", written.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("demo") for line in lines) == 8  # of two columns each, none wrapped


_DOCUMENT = """\\documentclass{article}
\\usepackage{booktabs,graphicx}
\\usepackage[T1]{fontenc}
\\begin{document}
\\input{table.tex}
\\end{document}
"""


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="TeX is not installed: pdflatex is not on the path")
@pytest.mark.parametrize("name", ["demo", "random:vit_tiny_patch4_32", "a" * 120])
def test_latex_compiles_and_fits_the_width_of_the_text(results: list[Result], tmp_path: Path, name: str) -> None:
    (tmp_path / "table.tex").write_text(render(_many_protocols(results, name), "latex"))
    (tmp_path / "main.tex").write_text(_DOCUMENT)

    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "main.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout


def test_latex_scales_a_tabular_that_is_wider_than_the_text(results: list[Result]) -> None:
    text = render(_many_protocols(results, "demo"), "latex")

    tabulars = text.count("\\begin{tabular}")
    scaled = "\\end{tabular}}\\ifdim\\wd0>\\linewidth\\resizebox{\\linewidth}{!}{\\usebox0}\\else\\usebox0\\fi"
    assert (tabulars, text.count("\\noindent\\sbox0{\\begin{tabular}"), text.count(scaled)) == (4, 4, 4)
    assert {len(columns) for columns in re.findall(r"@\{\}l(r+)@\{\}", text)} == {4}


def test_draws_stand_in_the_header_and_in_cells_that_have_others(
    results: list[Result], capsys: pytest.CaptureFixture[str]
) -> None:
    ncm = [result for result in results if (result.probe.name, result.split.subset) == ("ncm", "1img")]
    other = replace(ncm[0], checkpoint=replace(ncm[0].checkpoint, name="other", weights_sha256="f" * 64))

    table = make_table([*ncm, other])
    print_table(table)

    terminal, latex = capsys.readouterr().out, render(table, "latex")
    assert re.search(r"^draws +3$", terminal, re.MULTILINE)
    assert re.search(r"^other +\d+\.\d \(1\)$", terminal, re.MULTILINE)
    assert re.search(r"^pixels +\d+\.\d ± \d\.\d$", terminal, re.MULTILINE)
    assert "draws & 3 \\\\" in latex
    assert re.search(r"^other & \d+\.\d \(1\) \\\\$", latex, re.MULTILINE)


def test_markdown_has_at_most_six_columns_side_by_side(results: list[Result]) -> None:
    text = render(_many_protocols(results, "demo"), "md")

    assert [line.count("---:") for line in text.splitlines() if line.startswith("| ---")] == [4, 4, 4, 4]
