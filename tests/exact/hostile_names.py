"""Hostile names, and the properties that every report must keep for any name. As a script, it tries thousands of names."""

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
from msn_eval.reports import render
from msn_eval.reports.terminal import print_table
from msn_eval.reports.text_tables import row_text
from msn_eval.results.folder import list_results
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
# The only LaTeX commands and escaped characters that a report may contain.
_LATEX_WORDS = {
    "begin", "end", "toprule", "midrule", "bottomrule", "multicolumn", "textbf", "scriptsize", "footnotesize", "noindent",
    "par", "bigskip", "pm", "lambda", "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater",
    "textbar", "textquotedbl", "textquotesingle", "textasciigrave", "textendash", "dots",
}  # fmt: skip
_LATEX_SIGNS = set("\\{}%&$#_")


def records_named(name: str) -> list[Result]:
    """Return real records in which every text that a third party may choose is `name`."""
    return [_named(result, name) for result in list_results([_RECORDS])]


def _named(result: Result, name: str) -> Result:
    protocol = {
        **result.protocol,
        "subset": {"name": name, "rule": name},
        "by_hand": {"tap": f"{name}{result.protocol_id}"},  # so that every column states a reason
    }
    checkpoint = replace(
        result.checkpoint, name=name, path=name, arch=name, format=name, key=name, matched=0.5, allow_missing=(name,)
    )
    return replace(
        result,
        protocol=protocol,
        protocol_id=protocol_id(protocol),
        error=None if result.error is None else name,
        checkpoint=checkpoint,
        data=replace(result.data, name=name),
        split=replace(result.split, subset=name),
    )


def check_name(name: str) -> None:
    """Raise AssertionError if `name` changes more than its own cells in any report format."""
    table, plain = make_table(records_named(name)), make_table(records_named("plain"))
    for check in (_check_terminal, _check_markdown, _check_csv, _check_json, _check_latex):
        check(table, plain)


def _check_terminal(table: Table, plain: Table) -> None:
    def printed(one: Table) -> str:
        written = io.StringIO()
        print_table(one, Console(file=written, width=1_000_000, force_terminal=False))
        return written.getvalue()

    text = printed(table)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\u200b-\u200f]", text), (
        "a control character"
    )
    assert text.count("\n") == printed(plain).count("\n"), "more lines"
    assert all(one_line(row_text(row)) in text for row in table.rows), "a name that changed"


def _check_markdown(table: Table, plain: Table) -> None:
    text = render(table, "md")
    tokens, expected = _markdown(text), _markdown(render(plain, "md"))
    assert [token.type for token in tokens if token.type != "text"] == [
        token.type for token in expected if token.type != "text"
    ], "another structure"
    cells = _markdown_cells(text)
    groups = list(table.groups().values())
    assert [len(lines) - 1 for lines in cells] == [len(table.rows_of(columns)) for columns in groups], "rows"
    for lines, columns in zip(cells, groups, strict=True):
        assert {len(line) for line in lines} == {1 + len(columns)}, "columns"
        for line, (row, _) in zip(lines[1:], table.rows_of(columns), strict=True):
            assert line[0] == one_line(row_text(row)), (line[0], row_text(row))


def _markdown(text: str) -> list[Token]:
    """Return the markdown-it tokens of Markdown with GitHub's tables, including inline tokens."""
    parsed = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [inner for token in parsed for inner in (token, *(token.children or ()))]


def _markdown_cells(text: str) -> list[list[list[str]]]:
    """Return the visible text of the cells of each table, header first."""
    tables: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and token.level == 4 and tables:
            tables[-1][-1].append("".join(inner.content for inner in token.children or ()))
    return tables


def _check_csv(table: Table, plain: Table) -> None:
    def parsed(one: Table) -> list[list[str]]:
        return list(csv.reader(io.StringIO(render(one, "csv"), newline=""), strict=True))

    lines = parsed(table)
    assert [len(line) for line in lines] == [len(line) for line in parsed(plain)], "rows or columns"
    assert not any(field.startswith(("=", "+", "-", "@", "\t", "\r", "\0", "＝")) for line in lines for field in line)
    for line, row in zip(lines[1:], table.rows, strict=True):
        shown = one_line(row.name)
        assert line[0] == (f"'{shown}" if line[0].startswith("'") else shown), "a name that changed"
    render(table, "csv").encode()


def _check_json(table: Table, plain: Table) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(render(table, "json"), parse_constant=refuse)
    assert [row["name"] for row in content["rows"]] == [row.name for row in table.rows], "a name that changed"
    assert [len(row["cells"]) for row in content["rows"]] == [
        len(row["cells"]) for row in json.loads(render(plain, "json"))["rows"]
    ]


def _check_latex(table: Table, plain: Table) -> None:
    text = render(table, "latex")
    tokens, expected = latex_tokens(text), latex_tokens(render(plain, "latex"))
    shape = {"&", "\\\\", "\\begin", "\\end", "\\toprule", "\\multicolumn", "\\scriptsize", "\\par"}
    assert [one for one in tokens if one in shape] == [one for one in expected if one in shape], "another structure"
    render(table, "latex").encode()


def latex_tokens(text: str) -> list[str]:
    """Return the tokens of a LaTeX report. Raise AssertionError for any token that is not allowed."""
    _, _, body = text.partition("\n")  # the first line is a comment
    assert body.isprintable() or all(one.isprintable() or one == "\n" for one in body), "a control character"
    assert all(ord(one) < 256 for one in body), "a letter that the standard fonts lack"
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


def check_names(count: int) -> None:
    """Check `count` generated names."""
    tried: Callable[[], None] = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )(given(name=HOSTILE_NAMES)(check_name))
    tried()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=5000)
    chosen = parser.parse_args()
    for attack in ATTACKS:
        check_name(attack)
    check_names(chosen.names)
    print(f"{len(ATTACKS)} attack names and {chosen.names} generated names: none changed a report in any format")
