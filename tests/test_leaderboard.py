"""The committed leaderboard is what its records give."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import leaderboard

HOME = leaderboard.HOME


def test_pages_tables_and_figures_are_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    leaderboard.build(tmp_path)

    built = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    different = [str(path) for path in built if (tmp_path / path).read_bytes() != (HOME / path).read_bytes()]
    assert (len(built), different) == (3 * len(leaderboard.GROUPS) + 3, [])


@pytest.mark.parametrize("group", leaderboard.GROUPS)
def test_tables_of_supervised_networks_are_marked(group: str) -> None:
    texts = [(HOME / group / name).read_text(encoding="utf-8").lower() for name in ("table.html", "table.md")]

    assert ["supervised on these classes" in text for text in texts] == [group.endswith("-supervised")] * 2


def test_records_name_no_machine() -> None:
    records = [json.loads(path.read_text()) for path in (HOME / "records").rglob("*.json")]
    assert records
    assert not [record["checkpoint"]["path"] for record in records if record["checkpoint"]["path"].startswith("/")]


@pytest.mark.parametrize(
    ("top1", "expected"),
    [
        pytest.param([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], (0.01, 0.0, 0.0), id="draws only"),
        pytest.param([[0.1, 0.1, 0.1], [0.3, 0.3, 0.3]], (0.0, 0.02, 0.0), id="seeds only"),
        pytest.param([[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]], (0.01, 0.02, 0.0), id="both"),
        # Row and column means are equal, so all of it is interaction: a sum of squares of 0.04 over one degree of freedom.
        pytest.param([[0.1, 0.3], [0.3, 0.1]], (0.0, 0.0, 0.04), id="interaction only"),
    ],
)
def test_variance_is_attributed_to_its_source(top1: list[list[float]], expected: tuple[float, ...]) -> None:
    *sources, _ = leaderboard.estimate_variances(np.array(top1), images=100)

    assert sources == pytest.approx(expected, abs=1e-12)


def test_variance_of_test_images_is_binomial() -> None:
    *_, images = leaderboard.estimate_variances(np.full((2, 3), 0.2), images=100)

    assert images == pytest.approx(0.2 * 0.8 / 100)
