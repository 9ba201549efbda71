"""Every command and all Python code of README and docs run, on small data and page by page.

A block of commands may say what this suite lacks, by a comment before it: `<!-- needs: ImageNet, GPUs -->`. Lines that name it
are then parsed, with their config file and overrides, instead of run; the others are run.
"""

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from msn_eval.cli import _build_parser
from msn_eval.cli import _parse as parse_msn_eval
from msn_eval.cli import main as msn_eval
from msn_eval.commands import VERBS
from msn_eval.commands.evaluate import read_options
from msn_eval.distributed.slurm import parse_slurm
from msn_eval.errors import MsnEvalError
from msn_pretrain.cli import _parse as parse_msn_pretrain
from msn_pretrain.cli import _read_recipe as read_recipe
from msn_pretrain.cli import main as msn_pretrain

_ROOT = Path(__file__).parents[1]
_PAGES = {
    path.relative_to(_ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *(_ROOT / "docs").rglob("*.md")])
}
# What a line needs, by what stands in it.
_NEEDS = {
    "ImageNet": "/datasets/imagenet|configs/pretrain/msn_vits16.yaml",
    "GPUs": "cuda|nvjpeg",
    "Slurm": "--slurm",
    "several processes": "torchrun",
    "installation": r"^(\S*pip|python3|make|\.) ",
    "minutes": "msn-eval demo",
}
_COMMAND = re.compile(r"(?:\$ )?(msn-\w+|torchrun|make|\S*pip|python3|\.) ")
# What makes a run small. It comes last, and replaces what the line says.
_SMALLER = {
    r"^msn-pretrain (bench )?msn_digits": "data.limit=4 optimization.epochs=1 optimization.batch_size=16 optimization.warmup=0",
    r"^msn-pretrain bench": "--steps=1",
    r"^msn-eval --.*--data digits(?!.*--test)": "--limit=10",
    r"--config finetune": "finetune.epochs=1 finetune.warmup_epochs=0",
    r"--config linear_augmented_small": "linear_augmented.epochs=1",
    r"--probe linear": "linear.epochs=1 linear.seeds=1",
    r"^msn-eval watch": "--limit=5 --probe=ncm",
    r"^msn-eval show": "--images=1 --limit=2",
}
_RECORDS = {"runs": "ncm", "other-runs": "knn", "new-runs": "ncm,logistic"}  # result folders, and their probes
_RESULTS = {  # folders of results that a page expects to be there
    "docs/design/trust.md": ("runs",),
    "docs/leaderboard.md": ("runs",),
    "docs/regression-gate.md": ("new-runs",),
    "docs/reports.md": ("runs", "other-runs"),
}
_CHECKPOINTS = ("vitb16.pth.tar", "vitb16.pth", "vits16.pth", "a.pth.tar", "good.pth", "new.pth")
_ACTIONS = ("subsets fetch", "subsets draw", "data verify", "data split", "cache prune")
_FOREIGN = {
    "--index-url",
    "--standalone",
    "--nproc",
    "--write",
    "--measured",
}  # options of pip, torchrun and the cost model


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        kind: `commands`, `python`, or the name of the file that it is the content of.
        needs: What its comment says.
    """

    kind: str
    text: str
    needs: tuple[str, ...]


def _read_blocks(page: str) -> Iterator[Block]:
    needs: tuple[str, ...] = ()
    skipped = False
    comment = r"^<!-- (needs: .*|not run) -->$"
    fence = r"^```(\w+)(?: title=\"(.*)\")?\n([\s\S]*?)^```$"
    indented = r"^( {4,})(?! ).*\n(?:\5.*\n|\n(?=\5))*"
    for match in re.finditer(f"{comment}|{fence}|{indented}", page, re.MULTILINE):
        says, language, title, fenced, _ = match.groups()
        if says:
            skipped = says == "not run"
            needs = () if skipped else tuple(says.removeprefix("needs: ").split(", "))
            continue
        if fenced is not None:
            kind = "not run" if skipped else title or language
            yield Block(kind, fenced, needs)
        elif _COMMAND.match(match[0].lstrip()):
            yield Block("commands", match[0], needs)
        needs, skipped = (), False


def _read_commands(block: Block) -> list[tuple[str, int]]:
    """Return each command of a block, and its exit code where the block shows what it prints."""
    commands: list[tuple[str, int]] = []
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", block.text).splitlines() if line.strip()]
    shows_output = any(line.startswith("$ ") for line in lines)
    for line in lines:
        if code := re.fullmatch(r"exit code (\d+)", line):
            commands[-1] = (commands[-1][0], int(code[1]))
        elif line.startswith("$ ") or not shows_output:
            assert _COMMAND.match(line), f"not a command: {line}"
            commands.append((line.removeprefix("$ "), 0))
    return commands


@pytest.fixture(scope="session")
def place(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return a folder with what the pages name: checkpoints, image folders, results."""
    return once("documented place", _fill_place)


def _fill_place(folder: Path) -> None:
    import timm

    generator = np.random.default_rng(0)
    for split, count in (("photos/train", 6), ("photos/val", 3), ("flat", 5)):
        for label, name in enumerate(("ant", "bee", "cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 60, (40, 48, 3)) + 60 * (np.arange(3) == label)
                Image.fromarray(pixels.astype("uint8")).save(folder / split / name / f"{17 + number}.png")
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)
    for name in _CHECKPOINTS:
        torch.save(network.state_dict(), folder / name)
    assert (
        msn_eval(["convert", str(folder / "a.pth.tar"), str(folder / "new.safetensors"), "--to", "safetensors", "-q"])
        == 0
    )
    evaluation = ["--checkpoint", str(folder / "vitb16.pth.tar"), "--data", str(folder / "photos"), "--subset", "5imgs"]
    for name, probes in _RECORDS.items():
        words = [*evaluation, "--probe", probes, "--k", "10", "--out", str(folder / name), "--no-cache", "-q"]
        assert msn_eval(words) == 0


@pytest.mark.parametrize("name", [name for name, page in _PAGES.items() if list(_read_blocks(page))])
def test_commands_and_code_run(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = _RESULTS.get(name, ())
    left_out = {*_RECORDS, "cache"} - set(results)
    folder = shutil.copytree(place, tmp_path / "place", ignore=lambda _, names: left_out & set(names))
    shutil.copytree(_ROOT / "configs", folder / "configs")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for variable, value in (
        ("MPLBACKEND", "agg"),
        ("MSN_EVAL_DATA", "digits"),
        ("XDG_CACHE_HOME", str(place / "cache")),
    ):
        monkeypatch.setenv(variable, value)
    names: dict[str, object] = {}

    for block in _read_blocks(_PAGES[name]):
        if block.kind == "commands":
            _run_commands(block, capsys)
        elif block.kind == "python":
            exec(compile(block.text, name, "exec"), names)
        elif "." in block.kind:
            Path(block.kind).write_text(block.text, encoding="utf-8")
            if block.kind == "pyproject.toml":
                _install(tomllib.loads(block.text)["project"])
        elif block.kind == "not run":
            compile(block.text, name, "exec")


def _install(project: dict[str, Any]) -> None:
    """Do in the current folder what `pip install .` does: state the name, the version and the entry points."""
    information = Path(f"{project['name'].replace('-', '_')}-{project['version']}.dist-info")
    information.mkdir()
    header = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(header, encoding="utf-8")
    groups = project["entry-points"].items()
    points = "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups)
    (information / "entry_points.txt").write_text(points, encoding="utf-8")


def _run_commands(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    unmet = [re.compile(_NEEDS[need]) for need in block.needs]
    commands = _read_commands(block)
    for pattern in unmet:
        assert any(pattern.search(command) for command, _ in commands), f"no command needs {pattern.pattern!r}"
    for command, code in commands:
        if any(pattern.search(command) for pattern in unmet):
            _parse(command)
            continue
        more = [word for part, text in _SMALLER.items() if re.search(part, command) for word in text.split()]
        program, *words = shlex.split(command, comments=True)
        done = {"msn-eval": msn_eval, "msn-pretrain": msn_pretrain}[program]([*words, *more])
        assert done == code, f"{command}: exit code {done}\n{capsys.readouterr().err}"


def _parse(command: str) -> None:
    """Parse a command as its program does before it reads any file but configs; check that a target of make exists."""
    program, *words = shlex.split(command, comments=True)
    if program == "torchrun":
        module, *words = words[words.index("-m") + 1 :]
        program = module.replace("_", "-")
    if program == "make":
        assert re.search(rf"^{words[0]}:", (_ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), command
    if not program.startswith("msn-"):
        return
    if program == "msn-pretrain":
        options, _ = parse_msn_pretrain(words)
        if hasattr(options, "recipe"):
            read_recipe(options)
    elif words[0].startswith("-"):
        options, overrides = _build_parser("evaluate").parse_with_overrides(words, takes_overrides=True)
        read_options(options, overrides)
    else:
        options, _ = parse_msn_eval(words)
    if text := getattr(options, "slurm", None):
        parse_slurm(text)


@pytest.mark.parametrize("path", sorted((_ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_command_in_the_note_of_a_config_parses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_ROOT)
    (command,) = re.findall(r"^# Command: +((?:.*\\\n)*.*)", path.read_text(encoding="utf-8"), re.MULTILINE)

    _parse(command.replace("\\\n#", " "))


@pytest.mark.parametrize(
    "command",
    [
        "msn-eval --checkpoint a.pth --data /datasets/imagenet --subsett 5imgs",
        "msn-eval --config finetune_1pct --checkpoint a.pth --data /datasets/imagenet finetune.epoch=1",
        "msn-eval --checkpoint a.pth --data /datasets/imagenet --probe logistik",
        "msn-eval reproduce msn-vits16-5imgs --dat /datasets/imagenet",
        "msn-pretrain msn_digits data.rot=/datasets/imagenet",
        "torchrun --nproc_per_node=8 -m msn_pretrain msn_digit data.root=/datasets/imagenet",
        "make demos  # /datasets/imagenet",
    ],
)
def test_mistake_in_a_command_that_is_only_parsed_is_found(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((MsnEvalError, AssertionError)):
        _run_commands(Block("commands", f"    {command}\n", ("ImageNet",)), capsys)


@pytest.mark.parametrize(
    ("text", "needs"),
    [("msn-eval ls nothing", ()), ("msn-eval ls probes", ("GPUs",)), ("$ msn-eval ls probes\nexit code 2", ())],
    ids=["an error", "a need that no command has", "another exit code"],
)
def test_block_that_is_not_as_it_says_is_found(
    text: str, needs: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AssertionError):
        _run_commands(Block("commands", text, needs), capsys)


def test_every_option_that_a_page_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    programs = [
        *((msn_eval, verb) for verb in [*VERBS, *_ACTIONS]),
        *((msn_pretrain, verb) for verb in ("", "export", "bench")),
    ]
    for main, verb in programs:
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))

    named = {
        (name, option) for name, page in _PAGES.items() for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)
    }

    assert {(name, option) for name, option in named if option not in known | _FOREIGN} == set()
