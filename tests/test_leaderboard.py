"""The committed leaderboard is what its records give."""

import json
from pathlib import Path

import pytest

from benchmarks import leaderboard

HOME = leaderboard.HOME


def test_pages_tables_and_figure_are_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    leaderboard.build(tmp_path)

    built = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    different = [str(path) for path in built if (tmp_path / path).read_bytes() != (HOME / path).read_bytes()]
    assert (len(built), different) == (3 * len(leaderboard.GROUPS) + 1, [])


@pytest.mark.parametrize("group", leaderboard.GROUPS)
def test_records_name_no_machine(group: str) -> None:
    records = [json.loads(path.read_text()) for path in (HOME / "records" / group).glob("*.json")]
    assert records
    assert not [record["checkpoint"]["path"] for record in records if record["checkpoint"]["path"].startswith("/")]
