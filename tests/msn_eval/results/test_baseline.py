"""Baseline file: stable, small, and refused after any change."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_eval.errors import ComparisonError
from msn_eval.results.baseline import Baseline, make_baseline, read_baseline, render_baseline
from msn_eval.results.folder import list_results
from msn_eval.results.record import Result

RunWriter = Callable[..., list[Result]]
_RIGHT = np.random.default_rng(0).random((3, 1001)) < 0.7


@pytest.fixture
def baseline(write_run: RunWriter, tmp_path: Path) -> Baseline:
    write_run(tmp_path / "runs", _RIGHT)
    return make_baseline(list_results([tmp_path / "runs"]), [tmp_path / "runs"])


def test_written_baseline_reads_back_equal(baseline: Baseline, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(render_baseline(baseline))

    assert read_baseline(tmp_path / "b.json") == baseline
    assert np.array_equal(baseline.protocols[0].right, _RIGHT)


def test_equal_results_give_an_equal_file(baseline: Baseline, write_run: RunWriter, tmp_path: Path) -> None:
    write_run(tmp_path / "again", _RIGHT, changed=lambda one: replace(one, created="2027-01-01T00:00:00Z"))
    again = make_baseline(list_results([tmp_path / "again"])[::-1], [tmp_path / "again"])

    assert render_baseline(again) == render_baseline(baseline)


def test_any_changed_byte_and_any_truncation_is_refused(baseline: Baseline, tmp_path: Path) -> None:
    path, text = tmp_path / "b.json", render_baseline(baseline).encode()
    generator = np.random.default_rng(1)
    contents = [bytearray(text[:keep]) for keep in (0, 1, 100, 1500)]
    for index in generator.integers(0, len(text), 150):
        contents.append(bytearray(text))
        contents[-1][index] ^= 1 << int(generator.integers(0, 7))
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ComparisonError, match=r"b\.json: not a readable baseline"):
            read_baseline(path)


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"sha256": 1}', "[" * 100_000, '{"kind": "x", "schema": 1, "sha256": "y"}']
)
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)

    with pytest.raises(ComparisonError, match="not a readable baseline"):
        read_baseline(tmp_path / "b.json")


def test_missing_baseline_error_shows_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="no baseline: there is no such file") as raised:
        read_baseline(tmp_path / "b.json")

    assert "msn-eval baseline RUNS --out FILE" in str(raised.value)
    assert raised.value.exit_code == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 9}, r"knn k=1 T=0.07, 5imgs \[\w+\]: scored on a part of the images \(--limit 9\)"),
        ({"changed": lambda one: replace(one, status="not_converged")}, r"draws \[1, 2, 3\] did not converge"),
        ({"changed": lambda one: replace(one, status="failed", metrics=None, error="broken")}, "FAILED: broken"),
    ],
)
def test_failed_unconverged_or_partial_results_are_refused(
    write_run: RunWriter, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    results = write_run(tmp_path, _RIGHT, **options)

    with pytest.raises(ComparisonError, match=message):
        make_baseline(results, [tmp_path])
