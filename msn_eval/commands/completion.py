"""`msn-eval completion bash|zsh|fish`: a script that completes verbs and options."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence

from msn_eval.program import ArgumentParser

_INSTALL = {
    "bash": 'eval "$(msn-eval completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(msn-eval completion zsh)"   # in ~/.zshrc, after compinit',
    "fish": "msn-eval completion fish | source   # in ~/.config/fish/config.fish",
}
# zsh runs functions of bash; files are completed where no word fits.
_BASH = """_msn_eval() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words
  case "$COMP_CWORD:${{COMP_WORDS[1]}}" in
    1:*) words="{verbs} {options}" ;;
{cases}
    *) words="{options}" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _msn_eval msn-eval"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("shell", choices=_INSTALL, help="; ".join(_INSTALL.values()))


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the script."""
    print(f"# {_INSTALL[options.shell]}")
    if options.shell == "fish":
        print("\n".join(_write_fish(options.verbs, options.build_parser)))
        return 0
    if options.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    known = {verb: _join(_list_options(options.build_parser(verb))) for verb in options.verbs}
    cases = "\n".join(f'    *:{verb}) words="{words}" ;;' for verb, words in known.items() if verb != "evaluate")
    print(_BASH.format(verbs=_join(options.verbs), options=known["evaluate"], cases=cases))
    return 0


def _write_fish(verbs: Mapping[str, str], build_parser: Callable[[str], ArgumentParser]) -> Iterable[str]:
    for verb, summary in verbs.items():
        yield f"complete -c msn-eval -n __fish_use_subcommand -a {verb} -d {_quote(summary)}"
        # The options of `evaluate`, which needs no verb, wherever no other verb is.
        others = _join(name for name in verbs if name != "evaluate")
        seen = (
            f'"not __fish_seen_subcommand_from {others}"'
            if verb == "evaluate"
            else f'"__fish_seen_subcommand_from {verb}"'
        )
        for option, text in _list_options(build_parser(verb)).items():
            yield f"complete -c msn-eval -n {seen} -l {option[2:]} -d {_quote(text)}"


def _list_options(parser: ArgumentParser) -> dict[str, str]:
    """Return the long options of a verb, and of its actions, with their help."""
    actions = [action for each in parser.list_parsers() for action in each._actions]
    texts = {option: action.help or "" for action in actions for option in action.option_strings}
    return {option: text for option, text in texts.items() if option.startswith("--")}


def _join(words: Iterable[str]) -> str:
    return " ".join(words)


def _quote(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'"
