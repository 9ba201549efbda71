import pytest

from msn_eval.cli import main


def test_draw_is_of_the_data_set_of_the_environment_where_none_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MSN_EVAL_DATA", "digits")
    assert main(["subsets", "draw", "--subset", "1img@1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
