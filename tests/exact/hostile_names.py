"""Names that attack a report, and checks that no report format lets them. As a script it checks thousands of them."""

import argparse
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console

from msn_eval.errors import one_line
from msn_eval.reports import load_format
from msn_eval.reports.terminal import print_table
from msn_eval.reports.text_tables import describe_details, describe_row
from msn_eval.results.folder import ResultScan, list_results
from msn_eval.results.record import Result, protocol_id
from msn_eval.results.table import Table, make_table

_RECORDS = Path(__file__).parents[1] / "golden" / "records" / "schema-1"
ATTACKS = [
    "|", "\\", "\\|", "`", "```", "*", "_", "~~", "#", "[x](javascript:alert(1))", "![x](//y)", "<script>alert(1)</script>",
    "<!--", "-->", "</td></tr></table>", "&lt;", "&#124;", "https://x.y/", "@all", "$$", "\n", "\r\n", "\n| a | b |\n", "\n\n# h",
    "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\0=1", "'", "''=1", '"', '","', ";", "=HYPERLINK(\"http://x\")", "＝1",
    "%", "&", "$", "_", "{", "}", "^^5c", "^^M", "\\input{/etc/passwd}", "\\write18{ls}", "\\end{tabular}", "\\\\", "--", "<<",
    ",,", "?`", "[1ex]", "[red]", "[/]", "[link=file:///x]y[/link]", "{{7*7}}", "${x}", "%s", "{0}",
    "\x1b[31m", "\x1b]0;t\x07", "\x9b1m", "\u202e", "\u2066", "\u200b", "\u2028", "\u2029", "\u0085", "\ufeff", "\u00ad",
    "\udc80", "\U000e0041", "я", "中", "😀", "é", "e\u0301", "ﷺ", " ", "\u00a0", "NaN", "null", "true", "0", "FAILED", "–", "λ",
    "±", "0" * 48, "x" * 300,
]  # fmt: skip
HOSTILE_NAMES = st.one_of(
    st.sampled_from(ATTACKS),
    st.lists(st.sampled_from(ATTACKS) | st.text(max_size=4), min_size=1, max_size=6).map("".join),
    st.text(st.characters(), min_size=1, max_size=300),
)
# All commands and escapes of our LaTeX.
_LATEX_WORDS = {
    "begin", "end", "toprule", "midrule", "bottomrule", "textbf", "scriptsize", "footnotesize", "noindent",
    "par", "bigskip", "pm", "lambda", "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater",
    "textbar", "textquotedbl", "textquotesingle", "textasciigrave", "textendash", "dots",
    "sbox", "ifdim", "wd", "linewidth", "resizebox", "usebox", "else", "fi", "nopagebreak", "smallskip", "raggedright",
}  # fmt: skip
_LATEX_SIGNS = set("\\{}%&$#_")


def records_named(name: str) -> list[Result]:
    """Return real records in which everything that a user can name has this name."""
    return [_named(result, name) for result in list_results([_RECORDS])]


def _named(result: Result, name: str) -> Result:
    protocol = {
        **result.protocol,
        "subset": {"name": name, "rule": name},
        "by_hand": {"tap": f"{name}{result.protocol_id}"},  # so that every column has its reason
    }
    names = dict.fromkeys(("name", "path", "arch", "format", "key"), name)
    return replace(
        result,
        protocol=protocol,
        protocol_id=protocol_id(protocol),
        error=None if result.error is None else name,
        checkpoint=replace(result.checkpoint, **names, matched=0.5, allow_missing=(name,)),
        data=replace(result.data, name=name),
        split=replace(result.split, subset=name),
    )


def render(table: Table, name: str) -> str:
    """Return a table in a format that needs no records."""
    return load_format(name).render(table, ResultScan(results=(), paths=(), faults=()))


def check_name(name: str) -> None:
    """Raise AssertionError if a name changes more than its own cells in any format."""
    table, plain = make_table(records_named(name)), make_table(records_named("plain"))
    for check in (_check_terminal, _check_markdown, _check_csv, _check_json, _check_latex):
        check(table, plain)


def _check_terminal(table: Table, plain: Table) -> None:
    def print_to_text(table: Table) -> str:
        written = io.StringIO()
        print_table(table, Console(file=written, width=1_000_000, force_terminal=False))
        return written.getvalue()

    text = print_to_text(table)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\u200b-\u200f]", text), "controls"
    assert text.count("\n") == print_to_text(plain).count("\n"), "more lines"
    for row in table.rows:
        assert one_line(row.name) in text, "a name that changed"
        assert one_line(describe_details(row)) in text, "details that changed"


def _check_markdown(table: Table, plain: Table) -> None:
    text = render(table, "md")
    assert _markdown_structure(text) == _markdown_structure(render(plain, "md")), "a changed structure"
    cells = _markdown_cells(text)
    groups = list(table.groups().values())
    assert [len(lines) - 1 for lines in cells] == [len(table.rows_of(columns)) for columns in groups], "rows"
    for lines, columns in zip(cells, groups, strict=True):
        assert {len(line) for line in lines} == {1 + len(columns)}, "columns"
        for line, (row, _) in zip(lines[1:], table.rows_of(columns), strict=True):
            assert line[0] == one_line(describe_row(row)), (line[0], describe_row(row))


def _parse_markdown(text: str) -> list[Token]:
    """Return the tokens of Markdown with GitHub's tables."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def _markdown_structure(text: str) -> list[str]:
    tokens = [inner for token in _parse_markdown(text) for inner in (token, *(token.children or ()))]
    return [token.type for token in tokens if token.type != "text"]


def _markdown_cells(text: str) -> list[list[list[str]]]:
    """Return the visible text of the cells of each table, header first."""
    tables: list[list[list[str]]] = []
    for token in _parse_markdown(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and token.level == 4 and tables:
            tables[-1][-1].append("".join(inner.content for inner in token.children or ()))
    return tables


def _check_csv(table: Table, plain: Table) -> None:
    def parse(table: Table) -> list[list[str]]:
        return list(csv.reader(io.StringIO(render(table, "csv"), newline=""), strict=True))

    lines = parse(table)
    assert [len(line) for line in lines] == [len(line) for line in parse(plain)], "rows or columns"
    assert not any(field.startswith(("=", "+", "-", "@", "\t", "\r", "\0", "＝")) for line in lines for field in line)
    for line, row in zip(lines[1:], table.rows, strict=True):
        shown = one_line(row.name)
        assert line[0] == (f"'{shown}" if line[0].startswith("'") else shown), "a name that changed"
    render(table, "csv").encode()


def _check_json(table: Table, plain: Table) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(render(table, "json"), parse_constant=refuse)
    expected = json.loads(render(plain, "json"))
    assert [row["name"] for row in content["rows"]] == [row.name for row in table.rows], "a name that changed"
    assert [len(row["cells"]) for row in content["rows"]] == [len(row["cells"]) for row in expected["rows"]]


def _check_latex(table: Table, plain: Table) -> None:
    text = render(table, "latex")
    tokens, expected = latex_tokens(text), latex_tokens(render(plain, "latex"))
    shape = {"&", "\\\\", "\\begin", "\\end", "\\toprule", "\\sbox", "\\scriptsize", "\\par"}
    assert [token for token in tokens if token in shape] == [token for token in expected if token in shape], "structure"
    render(table, "latex").encode()


def latex_tokens(text: str) -> list[str]:
    """Return the tokens of our LaTeX; raise AssertionError for a command that we do not use."""
    _, _, body = text.partition("\n")  # the first line is a comment
    assert body.replace("\n", "").isprintable(), "a control character"
    assert all(ord(character) < 256 for character in body), "a letter that the standard fonts lack"
    tokens = re.findall(r"\\[A-Za-z]+|\\.|\\\n|[{}%&$#_^~]|\\|[^\\{}%&$#_^~]+", body)
    depth = 0
    for token in tokens:
        if token.startswith("\\"):
            assert token[1:] in _LATEX_WORDS | _LATEX_SIGNS, token
        assert token[0] not in "%#_^~", f"a bare {token[0]}"
        depth += (token == "{") - (token == "}")
        assert depth >= 0, "a brace too many"
    assert depth == 0, "an open brace"
    assert tokens.count("$") % 2 == 0, "open mathematics"
    assert not re.search(r"\\\\\s*[\[*]", body), "an argument of a line's end"
    return tokens


def check_names(count: int, check: Callable[[str], None] = check_name) -> None:
    """Check `count` generated names."""
    ignored = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=ignored
    )
    options(given(name=HOSTILE_NAMES)(lambda name: check(name)))()


def main(description: str | None, what: str, check: Callable[[str], None] = check_name) -> None:
    """Check all attacks, and as many generated names as the command line says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--names", type=int, default=5000)
    options = parser.parse_args()
    for attack in ATTACKS:
        check(attack)
    check_names(options.names, check)
    print(f"{len(ATTACKS)} attacks and {options.names} generated names: none changed a {what}")


if __name__ == "__main__":
    main(__doc__, "report format")
