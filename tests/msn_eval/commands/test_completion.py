import subprocess

import pytest

from msn_eval.cli import main
from msn_eval.commands import VERBS

_COMPLETE = 'source /dev/stdin; COMP_WORDS=({words}); COMP_CWORD={index}; _msn_eval; echo "${{COMPREPLY[@]}}"'


def _complete(script: str, *words: str) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    program = _COMPLETE.format(words=quoted, index=len(words) - 1)
    done = subprocess.run(["bash", "-c", program], input=script, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (("msn-eval", "rep"), ["report", "reproduce"]),
        (("msn-eval", "--sub"), ["--subset"]),
        (("msn-eval", "report", "runs", "--pub"), ["--published"]),
        (("msn-eval", "--checkpoint", "pixels", "--pro"), ["--probe"]),
        (("msn-eval", "cache", "prune", "--older"), ["--older-than"]),
        (("msn-eval", "report", "runs/"), []),
    ],
)
def test_bash_completes_verbs_and_options(
    words: tuple[str, ...], completions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    assert _complete(capsys.readouterr().out, *words) == completions


def test_zsh_reads_the_functions_of_bash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "autoload -U +X bashcompinit && bashcompinit"
    assert "complete -o default -F _msn_eval msn-eval" in lines


def test_fish_offers_the_options_of_an_evaluation_wherever_no_other_verb_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["completion", "fish"]) == 0
    (line,) = [
        line
        for line in capsys.readouterr().out.splitlines()
        if " -l subset " in line and "--subset" not in line and "not " in line
    ]
    condition = line.partition('-n "')[2].partition('"')[0].split()
    assert condition[:2] == ["not", "__fish_seen_subcommand_from"]
    assert set(condition[2:]) == set(VERBS) - {"evaluate"}


def test_fish_has_a_line_for_every_verb_with_balanced_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(f" -a {verb} -d " in line for line in lines) for verb in VERBS)
    assert all(line.replace(r"\'", "").count("'") in (0, 2) for line in lines[1:])
