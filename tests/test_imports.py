"""The sentences about who may import whom, kept true."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
# From the ground up; a module imports only from floors below its own.
_FLOORS = [
    ["errors"],
    ["number_range"],
    ["ranks", "ranks.limits", "ranks.place", "ranks.end"],
    ["ranks.others"],
    ["ranks.clerk", "ranks.watch"],
    ["ranks.line"],
    [
        "atomic_file",
        "shipped",
        "metrics",
        "position_embedding",
        "own_code",
        "host",
        "shortage",
        "augmentation",
        "reference_networks",
        "reference_file",
        "distributed",
        "stop",
        "slurm",
        "run_folder",
        "probe_recipe",
        "weights.sniff",
        "weights.opcodes",
        "weights.networks",
        "weights.tensor_facts",
    ],
    ["json_fields", "finetune_recipe", "process_group", "training_state", "reference_evaluation"],
    [
        "images",
        "result",
        "statistics",
        "protocol_difference",
        "config",
        "published_lists",
        "architectures",
        "last_block",
        "weights.families",
        "weights.load",
        "weights.torch_archive",
        "weights.safetensors_file",
        "weights.vetted",
        "weights.content",
        "weights.part",
        "weights.hub_files",
        "weights.hub_library",
    ],
    ["answers", "result_folder", "trunk"],
    ["baseline", "comparison"],
    ["regression"],
    ["decoders", "weights.hub_folder", "weights.rehearsal", "weights.alarms", "weights.download", "weights.hub_config"],
    ["weights.outline"],
    ["weights.read"],
    ["weights.msn_release", "stored_checkpoint"],
    ["weights.hub", "weights.convert", "inspection"],
    ["weights.classifier"],
    ["datasets.dataset", "request", "file_hashes", "ranking"],
    ["protocols.training_images"],
    [
        "datasets.listing",
        "datasets.image_index",
        "datasets.tar_members",
        "datasets.imagenet_labels",
        "datasets.hub_name",
    ],
    ["datasets.hub_splits"],
    ["datasets.hub_rows"],
    ["datasets.digits", "datasets.folder", "datasets.tar_source", "datasets.huggingface", "subset", "image_facts"],
    ["split_check"],
    ["manifest"],
    ["dataset_check"],
    ["datasets.imagenet", "datasets.webdataset"],
    ["datasets", "checkpoint"],
    ["encoder", "feature_cache"],
    ["environment", "pixel_loader", "portion", "visible_patches"],
    ["features", "collapse", "protocols.trainee"],
    ["augmented_features"],
    ["pictures"],
    ["protocols.rows", "protocols.cross_entropy", "protocols.fitted", "protocols.cosine", "protocols.linear_probe"],
    ["protocols.bank"],
    ["protocols.shortlist"],
    ["protocols.nearest"],
    ["protocols.sharded"],
    ["protocols.degenerate", "protocols.full_data", "protocols.lambda_choice"],
    ["protocols.line_search", "protocols.team", "protocols.warm_start"],
    ["protocols.newton", "protocols.lbfgs", "protocols.reference_solvers"],
    ["protocols.trainee_outputs"],
    ["protocols.finetune_step"],
    ["protocols.finetune"],
    [
        "protocols.logistic",
        "protocols.knn",
        "protocols.ridge",
        "protocols.ncm",
        "protocols.linear",
        "protocols.linear_augmented",
    ],
    ["protocols", "sklearn"],
    ["plan"],
    ["canary"],
    ["finetuning"],
    ["measurement", "baseline_plan"],
    ["evaluation"],
    ["forecast"],
    ["look"],
    ["run_alarms"],
    ["trajectory"],
    ["table", "verification"],
    ["leaderboard", "published"],
    ["reproduction"],
    ["reports.texts", "reports.markdown_text", "reports.points"],
    ["reports.gate_report", "reports.comparison_report"],
    ["reports.markdown", "reports.csv_report", "reports.json_report", "reports.latex", "reports.terminal"],
    ["reports"],
    ["reports.charts", "reports.panels", "reports.class_view", "reports.provenance", "reports.offline_page"],
    ["reports.curves", "reports.trajectory_panels"],
    ["reports.html_report", "reports.trajectory_report"],
    ["commands.evaluate"],
    [
        "commands.cache",
        "commands.data",
        "commands.report",
        "commands.reproduce",
        "commands.show",
        "commands.watch",
        "commands.verify",
        "commands.compare",
        "commands.baseline",
        "commands.check",
        "commands.subsets",
        "commands.ls",
        "commands.demo",
        "commands.inspect",
        "commands.convert",
    ],
    ["cli"],
    ["__main__"],
]
_FLOOR = {name: floor for floor, names in enumerate(_FLOORS) for name in names}
_FREE = {"", "weights", "commands"}  # packages that hold no code but, at the top, the list of public names


def _modules() -> list[Path]:
    return sorted(_ROOT.glob("msn_eval/**/*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(_ROOT / "msn_eval").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", _modules(), ids=_name)
def test_module_imports_only_from_floors_below(path: Path) -> None:
    name = _name(path)
    if name in _FREE:
        return
    own = {one.removeprefix("msn_eval").removeprefix(".") for one in _imports(path) if one.startswith("msn_eval")}

    above = {one for one in own - _FREE if _FLOOR[one] >= _FLOOR[name]}

    assert not above


def test_evaluation_never_imports_pretraining() -> None:
    importing = [path for path in _modules() if any(one.startswith("msn_pretrain") for one in _imports(path))]

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


def test_importing_every_module_configures_no_logging_and_draws_no_number() -> None:
    names = [f"msn_eval.{_name(path)}".rstrip(".") for path in _modules() if _name(path) != "__main__"]
    code = (
        "import importlib, logging, torch, random\n"
        "torch.manual_seed(1); random.seed(1); before = torch.get_rng_state(), random.getstate()\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('msn_eval').handlers\n"
    )

    assert "msn_eval.cli" in _loaded_after(code)
