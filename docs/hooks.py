"""What MkDocs does for this site beside rendering docs/: files of the repository that pages link to, help texts, notebooks."""

import contextlib
import io
import json
import posixpath
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_OUTSIDE = "repository"  # folder of the site with files of the repository that are not in docs/
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")
_FIELDS = "<!-- fields of the record -->"
_HELP = re.compile(r"^<!-- help: (msn-\w+)(.*?) -->$", re.MULTILINE)
# What a browser would load from another host. Links that a reader clicks are not among it.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link(?![^>]*rel="?canonical))\b[^>]*\s(?:src|href)="?(?:https?:)?//[^>]*>"""
    r"""|url\(["']?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*;"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks, and every file of the repository that a page links to."""
    for notebook in sorted((_ROOT / "docs").rglob("*.ipynb")):
        for uri, content in _run_notebook(notebook):
            files.append(File.generated(config, uri, content=content))
    outside = [path.relative_to(_ROOT).as_posix() for path in (_ROOT / "reports").rglob("*.md")]
    waiting = {"CONTRIBUTING.md", "CHANGELOG.md", *outside}
    for file in files.documentation_pages():
        waiting |= set(_list_outside(file.content_string, f"docs/{file.src_uri}"))
    done: set[str] = set()
    while waiting - done:
        name = min(waiting - done)
        done.add(name)
        path = _ROOT / name
        if not path.is_file():
            continue  # the link is reported as broken
        files.append(File.generated(config, f"{_OUTSIDE}/{name}", content=path.read_bytes()))
        if path.suffix == ".md":
            waiting |= set(_list_outside(path.read_text(encoding="utf-8"), name))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace `<!-- help: COMMAND -->` by what the command prints, and links out of docs/ by links within the site."""
    markdown = _HELP.sub(lambda match: _indent(_read_help(match[1], match[2].split())), markdown)
    if _FIELDS in markdown:
        schema = json.loads((_ROOT / "docs" / "reference" / "record.schema.json").read_text(encoding="utf-8"))
        rows = "".join(f"| `{path}` | {kind} | {text} |\n" for path, kind, text in _list_fields(schema))
        markdown = markdown.replace(_FIELDS, f"| field | type | content |\n| --- | --- | --- |\n{rows}")
    here = page.file.src_uri
    source = here.removeprefix(f"{_OUTSIDE}/") if here.startswith(f"{_OUTSIDE}/") else f"docs/{here}"

    def replace(match: re.Match[str]) -> str:
        target = _to_site(_resolve(match[1], source))
        return posixpath.relpath(target, posixpath.dirname(here))

    return _LINK.sub(replace, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site whose pages load anything from another host."""
    pages = (path for path in Path(config.site_dir).rglob("*") if path.suffix in (".html", ".css", ".svg"))
    for path in sorted(pages):
        if found := _LOADED.search(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path}: loads from another host: {found[0]}")


def _resolve(link: str, source: str) -> str:
    """Return the path in the repository that a link of the file `source` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _to_site(path: str) -> str:
    """Return the path in the site of a path in the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{_OUTSIDE}/{path}"


def _list_outside(text: str, source: str) -> Iterator[str]:
    """List the files outside docs/ that a page links to."""
    for match in _LINK.finditer(text):
        path = _resolve(match[1], source)
        if not path.startswith(("docs/", "../")):
            yield path


def _list_fields(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """List path, type and description of every field of an object's schema."""
    for name, field in schema["properties"].items():
        options = field.get("anyOf", [field])
        kinds = [kind for option in options for kind in _list_types(option)]
        yield f"{prefix}{name}", " or ".join(kinds), field.get("description", "").replace("|", "\\|")
        for option in options:
            if "properties" in option:
                yield from _list_fields(option, f"{prefix}{name}.")


def _list_types(schema: dict[str, Any]) -> list[str]:
    if "const" in schema or "enum" in schema:
        return [f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")])]
    kinds = schema["type"]
    return [kinds] if isinstance(kinds, str) else kinds


def _read_help(program: str, words: list[str]) -> str:
    from msn_eval.cli import main as evaluate
    from msn_pretrain.cli import main as pretrain

    main = {"msn-eval": evaluate, "msn-pretrain": pretrain}[program]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return output.getvalue()


def _indent(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _run_notebook(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """Run a notebook in an empty folder, and return its page and pictures by their paths in the site.

    A cell that raises an error ends the build.
    """
    import nbformat
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.read(path, as_version=4)
    resources = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    with tempfile.TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=300).preprocess(notebook, {"metadata": {"path": folder}})
    page, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    folder_uri = path.parent.relative_to(_ROOT / "docs").as_posix()
    yield f"{folder_uri}/{path.stem}.md", page
    for name, content in resources["outputs"].items():
        yield f"{folder_uri}/{name}", content
