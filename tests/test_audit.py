"""The audit of published numbers."""

from pathlib import Path

from benchmarks.audit import write_audit
from msn_eval.results.reproduction import list_reproductions

ROOT = Path(__file__).parents[1]


def test_committed_page_is_what_the_command_writes_without_data() -> None:
    page = write_audit(data=None, weights={}, runs="runs")
    assert (ROOT / "reports/audit.md").read_text(encoding="utf-8") == page
    assert all(f"| {number.name} |" in page for number in list_reproductions())


def test_number_whose_data_cannot_be_read_names_the_command_and_its_exit_code(tmp_path: Path) -> None:
    page = write_audit(data=str(tmp_path / "nowhere"), weights={"msn-vitb8": "b8.pth"}, runs=str(tmp_path / "runs"))
    assert f"`msn-eval reproduce msn-vits16-1img --data {tmp_path / 'nowhere'}" in page
    assert page.count("ends with 21") == sum(n.network.checkpoint is not None for n in list_reproductions()) + 3
    assert "| not measured: no weights |" in page
