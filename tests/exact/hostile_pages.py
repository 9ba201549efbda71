"""Checks that no name attacks a page. As a script it checks thousands of names."""

import base64
import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import hostile_names
import numpy as np

from msn_eval.monitor.alarms import Alarm
from msn_eval.monitor.snapshot_features import ExtractionSettings, SnapshotFeatures
from msn_eval.monitor.trajectory import Point, RunInfo, Trajectory
from msn_eval.reports.html.leaderboard import render
from msn_eval.reports.html.trajectory import draw_panels, render_page
from msn_eval.results.folder import ResultScan
from msn_eval.results.record import Result
from msn_eval.results.table import make_table

_ADDRESSES = {
    "src", "href", "action", "formaction", "data", "srcset", "poster", "background", "ping", "xlink:href", "manifest",
}  # fmt: skip
_BLOCKS = {"script": 2, "style": 1}


class Page(HTMLParser):
    """A parsed page: the count of each tag, all attributes, and the contents of scripts, styles and texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.texts: list[str] = []
        self.others: list[str] = []  # comments, declarations, …
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag, tuple(sorted(name for name, _ in attrs))] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in self.inside:
            self.inside[tag].append("")
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.inside:
            self.inside[self._open][-1] += data
        else:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.others.append(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def page_of(results: list[Result], folder: Path) -> str:
    """Return the page of records whose predictions are in a folder."""
    paths = tuple(folder / f"{result.id}.json" for result in results)
    return render(make_table(results), ResultScan(results=tuple(results), paths=paths, faults=()))


def _write_predictions(results: list[Result], folder: Path, name: str) -> None:
    """Write predictions whose classes have this name, as far as a folder can have it."""
    folder_name = "".join(character for character in name if character not in "/\0").encode("utf-8", "surrogatepass")
    ids = [folder_name + f"{number}/0.png".encode() for number in range(10)]
    for result in results:
        if result.metrics is not None:
            label = np.arange(10)
            arrays = {"image": np.array(ids), "label": label, "rank_of_label": label % 2 + 1, "prediction": label}
            np.savez(folder / f"{result.id}.npz", **arrays)


def check_name(name: str) -> None:
    """Raise AssertionError if a name changes more than its own texts in the page of a table or of a run."""
    page, expected = _checked(_page_named(name), _harmless(_page_named))
    _check_data(page, expected)
    _checked(_run_named(name), _harmless(_run_named))


@cache
def _harmless(named: Callable[[str], str]) -> str:
    return named("plain")


def _page_named(name: str) -> str:
    results = hostile_names.records_named(name)
    with tempfile.TemporaryDirectory() as folder:
        _write_predictions(results, Path(folder), name)
        return page_of(results, Path(folder))


def _run_named(name: str) -> str:
    """Return the page of a run in which everything has this name."""
    settings = ExtractionSettings(data_sha256="d", tap="cls-norm", precision="exact")
    features = SnapshotFeatures(
        step=5, epoch=1, created="", sha256="", weights_sha256="w", seen=settings, images=9, feature_rank=2.0,
        feature_spread=0.5, problem=f"problem {name}",
    )  # fmt: skip
    trajectory = Trajectory(
        run=RunInfo(name=name, method=f"msn {name}", data=None, subset=None, epochs=2, warmup_epochs=0, prototypes=8),
        steps_per_epoch=5,
        lines=({"step": 1.0, "epoch": 0.0, "loss": 1.0}, {"step": 9.0, "epoch": 1.0, "loss": None}),
        points=(Point(step=5, epoch=1, features=features, results=tuple(hostile_names.records_named(name))),),
        alarms=(Alarm(what=f"alarm {name}", first=1, last=9, is_active=True),),
        notices=(f"notice {name}",),
    )
    return render_page(trajectory, draw_panels(trajectory))


def _checked(text: str, plain: str) -> tuple[Page, Page]:
    """Compare a page with that of harmless names, and return both."""
    text.encode()
    page, expected = Page(text), Page(plain)
    assert page.tags == expected.tags, "changed elements or attributes"
    assert page.others == expected.others == ["doctype html"], "comments or declarations"
    assert {tag: len(inside) for tag, inside in page.inside.items()} == _BLOCKS, "scripts or styles"
    assert page.inside["script"][1] == expected.inside["script"][1], "a changed script"
    assert page.inside["style"] == expected.inside["style"], "a changed style"
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"], "a handler"
    addresses = {value for _, name, value in page.attributes if name in _ADDRESSES}
    assert addresses == {"data:,"}, addresses
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\u200b-\u200f]", text), "controls"
    _check_policy(page)
    assert not set("<>&") & set(page.inside["script"][0]), "unescaped HTML"
    return page, expected


def _check_policy(page: Page) -> None:
    """Check that the policy allows the script and the style of the page, and nothing else."""
    (policy,) = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    digests = {kind: f"'sha256-{_digest(page.inside[kind][-1])}'" for kind in ("script", "style")}
    assert rules == {
        "default-src": "'none'",
        "style-src": digests["style"],
        "script-src": digests["script"],
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }, rules


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _check_data(page: Page, expected: Page) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    first, second = (json.loads(parsed.inside["script"][0], parse_constant=refuse) for parsed in (page, expected))
    sizes = ([list(data), len(data["rows"]), len(data["records"]), data["cells"]] for data in (first, second))
    assert next(sizes) == next(sizes), "changed data"


def check_names(count: int) -> None:
    """Check `count` generated names."""
    hostile_names.check_names(count, check_name)


if __name__ == "__main__":
    hostile_names.main(__doc__, "page", check_name)
