"""Registries: plug-ins of installed distributions beside the built-in implementations."""

import sys
from pathlib import Path

import pytest

from msn_eval.errors import UsageError
from msn_eval.registry import Entry, find_entry, read_registry

_BUILT_IN = [Entry(name="knn", summary="nearest neighbours", target="math:sqrt")]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the entry-point file of an installed distribution `extra 1.2`."""
    folder = tmp_path / "extra-1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.2\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return folder / "entry_points.txt"


def test_a_plug_in_follows_the_built_in_implementations(install: Path) -> None:
    install.write_text("[msn_eval.probes]\ncosine = math:cos\n")

    registry = read_registry("probes", _BUILT_IN)

    assert list(registry) == ["knn", "cosine"]
    assert (registry["cosine"].summary, registry["cosine"].load()) == ("plug-in of extra 1.2", __import__("math").cos)


def test_a_plug_in_with_a_taken_name_is_refused(install: Path) -> None:
    install.write_text("[msn_eval.probes]\nknn = math:cos\n")

    with pytest.raises(UsageError, match=r"extra 1.2 adds 'knn' to probes, but that name is taken by msn-eval"):
        read_registry("probes", _BUILT_IN)


@pytest.mark.parametrize("target", ["no_such_module:probe", "math:no_such_name"])
def test_a_broken_plug_in_is_named_when_it_is_used(install: Path, target: str) -> None:
    install.write_text(f"[msn_eval.probes]\nbroken = {target}\n")
    entry = read_registry("probes", _BUILT_IN)["broken"]

    with pytest.raises(UsageError, match=r"The plug-in 'broken' of extra 1.2 cannot be imported: \w+Error: "):
        entry.load()


def test_an_unknown_name_has_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        find_entry(read_registry("probes", _BUILT_IN), "kn", what="probe")

    assert "No probe is called 'kn'. Did you mean knn?" in str(caught.value)
