"""Imports flow one way: the layers of the packages, and what loading a module may do."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from msn_eval.cli import main

_ROOT = Path(__file__).parents[1]
# From the top down: a component of msn_eval, a folder or a module, imports only from layers below its own.
_LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("api", "callbacks", "pytest_plugin"),
    ("reports",),
    ("monitor",),
    ("evaluation", "sklearn"),
    ("probes",),
    ("features",),
    ("checkpoints",),
    ("data", "results"),
    ("distributed", "models", "config"),
    ("files",),
    ("registry", "program"),
    ("process",),
    ("errors", "version"),
)
_LAYER = {component: depth for depth, layer in enumerate(_LAYERS) for component in layer}


def _modules() -> list[Path]:
    return sorted(_ROOT.glob("msn_eval/**/*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the dotted names that statements import: of `from a import b`, `a.b` where that is a module, else `a`."""
    imported = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if _path(name) is not None}
            imported |= modules | ({node.module} if modules != names else set())
    return imported


def _imported_by(path: Path) -> set[str]:
    return _imported(ast.walk(ast.parse(path.read_text())))


def _path(name: str) -> Path | None:
    base = _ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _component(name: str) -> str:
    """Return the folder or module of msn_eval that a dotted name belongs to, "" for the package itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "msn_eval" and len(parts) > 1 else ""


def _imports_of_components() -> dict[str, set[str]]:
    imports: defaultdict[str, set[str]] = defaultdict(set)
    for path in _modules():
        own = _component(_name(path))
        imported = {_component(name) for name in _imported_by(path) if name.startswith("msn_eval.")}
        imports[own] |= imported - {own, ""}
    del imports[""]  # the package itself names its public functions
    return imports


def test_every_component_has_a_layer() -> None:
    assert set(_imports_of_components()) == set(_LAYER)


@pytest.mark.parametrize("component", _LAYER)
def test_component_imports_only_from_layers_below(component: str) -> None:
    imported = _imports_of_components()[component]

    assert {name for name in imported if _LAYER[name] <= _LAYER[component]} == set()


@pytest.mark.parametrize("package", ["msn_eval", "msn_pretrain"])
def test_modules_import_each_other_in_no_cycle(package: str) -> None:
    graph = {_name(path): _imported_by(path) for path in sorted(_ROOT.glob(f"{package}/**/*.py"))}
    within = {name: imported & (graph.keys() - {name}) for name, imported in graph.items()}

    TopologicalSorter(within).prepare()  # raises CycleError, which names the cycle


def test_evaluation_never_imports_pretraining() -> None:
    importing = [path for path in _modules() if any(name.startswith("msn_pretrain") for name in _imported_by(path))]

    assert importing == []


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _run_on_import(child)


def test_importing_a_module_needs_no_posix_module() -> None:
    importing = [
        _name(path)
        for path in _modules()
        if _imported(_run_on_import(ast.parse(path.read_text()))) & {"fcntl", "resource", "termios", "pwd"}
    ]

    assert importing == []


def _loaded_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=_ROOT, check=True)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_help_loads_nothing_heavy() -> None:
    loaded = _loaded_after("from msn_eval.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass")

    assert loaded.isdisjoint({"torch", "timm", "pandas", "sklearn", "scipy", "faiss", "cyanure", "omegaconf", "rich"})


def test_reports_are_made_without_torch(digits_runs: Path, tmp_path: Path) -> None:
    report = ["report", str(digits_runs), "--published", "--format", "md,csv,json,latex", "--out", str(tmp_path)]
    verify = ["verify", str(digits_runs)]

    loaded = _loaded_after(f"from msn_eval.cli import main\nassert main({report!r}) == main({verify!r}) == 0")

    assert "torch" not in loaded


def test_finished_rerun_only_looks_at_its_records(tmp_path: Path) -> None:
    for split, name, shade in product(("train", "val"), ("a", "b"), (0, 200)):
        path = tmp_path / "photos" / split / name / f"{shade}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade + (name == "b") + 2 * (split == "val")).save(path)
    out = tmp_path / "runs"
    options = (
        f"--checkpoint pixels --data {tmp_path / 'photos'} --subset 1img@1 --probe logistic,knn,ncm --k 1 --device cpu"
    )
    command = [*options.split(), "--no-cache", "--out", str(out)]
    assert main(command) == 0
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}

    loaded = _loaded_after(f"from msn_eval.cli import main\nassert main({command!r}) == 0")

    assert loaded.isdisjoint({"timm", "torchvision", "pandas", "pyarrow", "sklearn", "scipy", "faiss", "cyanure"})
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == files


def test_importing_every_module_configures_no_logging_and_draws_no_number() -> None:
    names = [_name(path) for path in _modules() if path.stem != "__main__"]
    code = (
        "import importlib, logging, torch, random\n"
        "torch.manual_seed(1); random.seed(1); before = torch.get_rng_state(), random.getstate()\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('msn_eval').handlers\n"
    )

    assert "msn_eval.cli" in _loaded_after(code)
