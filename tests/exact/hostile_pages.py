"""The properties that every HTML page must keep for hostile names. As a script, it tries thousands of names."""

import argparse
import base64
import hashlib
import importlib.util
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
from hypothesis import HealthCheck, given, settings

from msn_eval.monitor.alarms import Alarm
from msn_eval.monitor.snapshot_features import Seen, SnapshotFeatures
from msn_eval.monitor.trajectory import Point, RunInfo, Trajectory
from msn_eval.reports.html.leaderboard import render_html
from msn_eval.reports.html.trajectory import render_page, sheet_of
from msn_eval.results.folder import ResultScan
from msn_eval.results.record import Result
from msn_eval.results.table import make_table

_ADDRESSES = (
    "src",
    "href",
    "action",
    "formaction",
    "data",
    "srcset",
    "poster",
    "background",
    "ping",
    "xlink:href",
    "manifest",
)
_STOREYS = {"script": 2, "style": 1}


@cache
def names() -> ModuleType:
    """Return the module `hostile_names` from the same folder."""
    spec = importlib.util.spec_from_file_location("hostile_names", Path(__file__).with_name("hostile_names.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """A parsed page: the number of each tag, its attributes, and the contents of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.texts: list[str] = []
        self.others: list[str] = []  # comments, declarations and the like
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

    def handle_decl(self, decl: str) -> None:
        self.others.append(decl)

    def handle_pi(self, data: str) -> None:
        self.others.append(data)

    def unknown_decl(self, data: str) -> None:
        self.others.append(data)


def page_of(results: list[Result], folder: Path) -> str:
    """Return the page of the records, with predictions read from `folder`."""
    scan = ResultScan(results=tuple(results), paths=tuple(folder / f"{one.id}.json" for one in results), faults=())
    return render_html(make_table(results), scan, show_published=False)


def _write_predictions(results: list[Result], folder: Path, name: str) -> None:
    """Write predictions whose classes are named `name`, without the characters that a folder name cannot contain."""
    folder_name = "".join(one for one in name if one not in "/\0").encode("utf-8", "surrogatepass")
    ids = [folder_name + f"{number}/0.png".encode() for number in range(10)]
    for result in results:
        if result.metrics is not None:
            place = np.arange(10)
            np.savez(
                folder / f"{result.id}.npz",
                image=np.array(ids),
                label=place,
                rank_of_label=place % 2 + 1,
                prediction=place,
            )


def check_name(name: str) -> None:
    """Raise AssertionError if `name` changes more than its own texts in the page of a table or of a run."""
    page, expected = _checked(_page_named(name), _harmless(_page_named))
    _check_data(page, expected)
    _checked(_run_named(name), _harmless(_run_named))


@cache
def _harmless(named: Callable[[str], str]) -> str:
    return named("plain")


def _page_named(name: str) -> str:
    results = names().records_named(name)
    with tempfile.TemporaryDirectory() as folder:
        _write_predictions(results, Path(folder), name)
        return page_of(results, Path(folder))


def _run_named(name: str) -> str:
    """Return the page of a run in which every name is `name`."""
    seen = Seen(data_sha256="d", tap="cls-norm", precision="exact")
    look = SnapshotFeatures(
        step=5, epoch=1, created="", sha256="", weights_sha256="w", seen=seen, images=9, feature_rank=2.0,
        feature_spread=0.5, problem=f"problem {name}",
    )  # fmt: skip
    trajectory = Trajectory(
        facts=RunInfo(name=name, method=f"msn {name}", data=None, subset=None, epochs=2, warmup_epochs=0, prototypes=8),
        steps_an_epoch=5,
        lines=({"step": 1.0, "epoch": 0.0, "loss": 1.0}, {"step": 9.0, "epoch": 1.0, "loss": None}),
        points=(Point(step=5, epoch=1, look=look, results=tuple(names().records_named(name))),),
        alarms=(Alarm(what=f"alarm {name}", first=1, last=9, on=True),),
        notices=(f"notice {name}",),
    )
    return render_page(sheet_of(trajectory))


def _checked(text: str, plain: str) -> tuple[Page, Page]:
    """Parse a page and the page of harmless names, check that they agree, and return both."""
    text.encode()
    page, expected = Page(text), Page(plain)
    assert page.tags == expected.tags, "other elements or attributes"
    assert page.others == expected.others == ["doctype html"], "comments or declarations"
    assert {tag: len(inside) for tag, inside in page.inside.items()} == _STOREYS, "scripts or styles"
    assert page.inside["script"][1] == expected.inside["script"][1], "another script"
    assert page.inside["style"] == expected.inside["style"], "another style"
    assert not [one for one in page.attributes if one[1].startswith("on") or one[1] == "style"], "a handler or a style"
    addresses = {value for _, name, value in page.attributes if name in _ADDRESSES}
    assert addresses == {"data:,"}, addresses
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b-\u200f\u2028\u2029]", text), (
        "controls"
    )
    _check_policy(page)
    assert not set("<>&") & set(page.inside["script"][0]), "unescaped HTML characters in the data"
    return page, expected


def _check_policy(page: Page) -> None:
    """Check that the content security policy allows only the script and the style of the page."""
    (policy,) = [
        value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "default-src" in value
    ]
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

    data, harmless = (json.loads(one.inside["script"][0], parse_constant=refuse) for one in (page, expected))
    assert [list(data), len(data["rows"]), len(data["records"]), data["cells"]] == [
        list(harmless), len(harmless["rows"]), len(harmless["records"]), harmless["cells"],
    ], "other data"  # fmt: skip


def check_names(count: int) -> None:
    """Check `count` generated names."""
    tried: Callable[[], None] = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )(given(name=names().HOSTILE_NAMES)(check_name))
    tried()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=5000)
    chosen = parser.parse_args()
    for attack in names().ATTACKS:
        check_name(attack)
    check_names(chosen.names)
    print(f"{len(names().ATTACKS)} attack names and {chosen.names} generated names: none changed a page")
