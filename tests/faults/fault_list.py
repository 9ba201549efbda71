"""Try the faults of `faults.yaml` with the real commands, run the tests that it names, and write `reports/reliability.md`.

    python tests/faults/fault_list.py

A trial of a row is a command in a folder into which `make`, a function of `injections.py`, has put the fault. It must end with
the exit code of the row, name what is wrong without a traceback, leave every file that was there as it was, and add none
(except those that match `writes`).
"""

import argparse
import hashlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import yaml

ROOT = Path(__file__).parents[2]
_LIST = Path(__file__).parent / "faults.yaml"
_MOST_SECONDS = 120
_MOST_LINES = 14


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A command that meets a fault.

    Attributes:
        make: Function of `injections.py` that puts the fault into the folder.
        command: Arguments of the program.
        program: The package that is run.
        shell: How a shell starts `{command}`, where a redirection or a limit is the fault.
        exit: Exit code.
        stderr: Texts that standard error must contain.
        stdout: Texts that standard output must contain, where what is wrong is the result asked for.
        writes: Patterns of files that may be new or change.
        suite: Whether the test suite tries it; `make faults` tries every trial.
    """

    make: str
    command: Sequence[str]
    program: str = "msn_eval"
    shell: str = "{command}"
    exit: int
    stderr: Sequence[str] = ()
    stdout: Sequence[str] = ()
    writes: Sequence[str] = ()
    suite: bool = True


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row of the list.

    Attributes:
        id: Letter of its table, and number.
        fault: What goes wrong.
        injection: How it is made to happen.
        exit: Exit codes; none where the program must continue or ends by other rules.
        names: What the message names.
        survives: What is still there afterwards.
        test: Node ids of tests, file::function.
        trials: Commands that meet it.
        not_tried: Why something of it is not tried here.
    """

    id: str
    fault: str
    injection: str
    exit: Sequence[int]
    names: str
    survives: str
    test: Sequence[str] = ()
    trials: Sequence[Trial] = ()
    not_tried: str = ""


def read_faults(path: Path = _LIST) -> list[Fault]:
    """Return the rows of the list; an unknown or missing field is an error."""
    rows: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [_read_fault(row) for row in rows]


def _read_fault(row: dict[str, Any]) -> Fault:
    trials = [Trial(**{"exit": row["exit"][0] if row["exit"] else 0} | trial) for trial in row.get("trials", ())]
    return Fault(**row | {"trials": trials})


def load_injections() -> ModuleType:
    """Return the module `injections`, which is in no package."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        return importlib.import_module("injections")
    finally:
        sys.path.remove(str(Path(__file__).parent))


def run_trial(trial: Trial, scene: Path, work: Path) -> list[str]:
    """Run the command of a trial in `work`, a folder that does not exist, and return what was wrong with how it ended.

    Args:
        trial: What is tried.
        scene: Folder that `injections.fill_scene` has filled.
        work: Becomes a copy of the scene with the fault.
    """
    shutil.copytree(scene, work)
    getattr(load_injections(), trial.make)(work)
    before = _hash_files(work)
    command = shlex.join([sys.executable, "-m", trial.program, *trial.command])
    variables = {"MSN_EVAL_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", trial.shell.format(command=command)],
        cwd=work,
        env=os.environ | variables | {"PYTHONPATH": f"{ROOT}{os.pathsep}{work}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=_MOST_SECONDS,
        check=False,
    )
    faults = [] if done.returncode == trial.exit else [f"exit code {done.returncode}, not {trial.exit}"]
    faults += [f"stderr lacks {text!r}" for text in trial.stderr if text not in done.stderr]
    faults += [f"stdout lacks {text!r}" for text in trial.stdout if text not in done.stdout]
    if "Traceback" in done.stderr or "\x1b" in done.stderr:
        faults.append("stderr has a traceback or escape sequences")
    if trial.exit and done.stderr.count("\n") > _MOST_LINES:
        faults.append(f"stderr has more than {_MOST_LINES} lines")
    after = _hash_files(work)
    allowed = {path.relative_to(work) for pattern in trial.writes for path in work.glob(pattern)}
    faults += [
        f"{path} is lost or changed" for path in before if after.get(path) != before[path] and path not in allowed
    ]
    faults += [f"{path} is new" for path in after if path not in before and path not in allowed]
    return [*faults, f"stdout: {done.stdout}", f"stderr: {done.stderr}"] if faults else []


def _hash_files(folder: Path) -> dict[Path, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Try every row, write the page, and return 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "reliability.md")
    parser.add_argument("--trials-only", action="store_true", help="do not run the tests that the rows name")
    options = parser.parse_args()
    faults = read_faults()
    nodes = sorted({node for fault in faults for node in fault.test})
    with tempfile.TemporaryDirectory() as folder:
        trials = _run_trials(faults, Path(folder))
        tests = None if options.trials_only else _run_tests(nodes, Path(folder) / "junit.xml")
    text, failures = _report(faults, trials, tests)
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out}: {failures or 'no'} failures")
    return 1 if failures else 0


def _run_trials(faults: Sequence[Fault], folder: Path) -> dict[str, list[bool]]:
    """Return whether each trial of each row passed, and print what was wrong."""
    scene = folder / "scene"
    scene.mkdir()
    load_injections().fill_scene(scene)
    passed: dict[str, list[bool]] = {fault.id: [] for fault in faults}
    for fault in faults:
        for number, trial in enumerate(fault.trials):
            wrong = run_trial(trial, scene, folder / f"{fault.id}-{number}")
            passed[fault.id].append(not wrong)
            print(fault.id, trial.make, "passed" if not wrong else "\n    ".join(["FAILED", *wrong]), flush=True)
    return passed


def _run_tests(nodes: Sequence[str], junit: Path) -> dict[str, Counter[str]]:
    """Return how often the cases of each test passed, failed or were skipped; a test without counts did not run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *nodes]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False)
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for case in ElementTree.parse(junit).iter("testcase"):
        function = case.attrib["name"].partition("[")[0]
        node = f"{case.attrib['classname'].replace('.', '/')}.py::{function}"
        outcome = {"skipped": "skipped", "failure": "failed", "error": "failed"}
        kinds = [outcome[child.tag] for child in case if child.tag in outcome]
        outcomes[node][kinds[0] if kinds else "passed"] += 1
    return outcomes


def _report(
    faults: Sequence[Fault], trials: dict[str, list[bool]], tests: dict[str, Counter[str]] | None
) -> tuple[str, int]:
    """Return the page, and the number of rows that failed."""
    rows, verdicts = [], Counter[str]()
    for fault in faults:
        verdict = _judge(fault, trials[fault.id], tests)
        verdicts[verdict] += 1
        exits = ", ".join(map(str, fault.exit)) or "–"
        rows.append(
            f"| {fault.id} | {fault.fault} | {exits} | {len(fault.trials) or '–'} | {len(fault.test)} | {verdict} |"
        )
    commands = [passed for fault in faults for passed in trials[fault.id]]
    partly = [f"- {row.id} ({row.fault}): {row.not_tried}." for row in faults if row.not_tried]
    cases = sum((count for count in (tests or {}).values()), Counter[str]())
    text = _PAGE.format(
        rows=len(faults),
        verdicts=", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()),
        commands=len(commands),
        good=sum(commands),
        functions=len({node for fault in faults for node in fault.test}),
        ran="not run for this page, but with the test suite"
        if tests is None
        else f"{cases['passed']} cases passed, {cases['failed']} failed, {cases['skipped']} were skipped",
        partly="\n".join(partly),
        table="\n".join(rows),
        date=time.strftime("%Y-%m-%d"),
    )
    return text, verdicts["FAILED"]


def _judge(fault: Fault, trials: Sequence[bool], tests: dict[str, Counter[str]] | None) -> str:
    if not all(trials):
        return "FAILED"
    if tests is None:
        return "trials passed" if trials else "tested by the suite" if fault.test else "not tried"
    if any(tests[node]["failed"] or not tests[node]["passed"] for node in fault.test):
        return "FAILED"
    return "passed" if trials or fault.test else "not tried"


_PAGE = """# Faults, and what happens then

`make faults` tries the {rows} faults of `tests/faults/faults.yaml`, where each row states the injection, the exit code, what the
message must name, what must survive, and the tests. This page was written on {date}, on a machine without a GPU.

- Rows: {verdicts}.
- Trials: {commands} commands in a folder with the fault, {good} as expected: the exit code, the names in the message, no
  traceback, every other file unchanged, no new file. The test suite runs about half of them.
- Tests: {functions} functions that the rows name: {ran}.

`make kill-test` and `make corrupt` repeat the random kills and the random damage more often (reports/faults).

## Not tried here

{partly}

## All rows

Trials are commands, tests are functions. A row fails if one of them fails or does not run.

| id | fault | exit code | trials | tests | result |
| --- | --- | --- | --- | --- | --- |
{table}
"""


if __name__ == "__main__":
    sys.exit(main())
