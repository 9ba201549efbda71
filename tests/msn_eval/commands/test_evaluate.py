"""The evaluation's command: its plan, its ranks, and what it submits to Slurm."""

import contextlib
import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.cli import main
from msn_eval.commands import evaluate
from msn_eval.commands.evaluate import describe_costs
from msn_eval.config.request import EvaluationConfig
from msn_eval.distributed.group import Group
from msn_eval.errors import UsageError
from msn_eval.evaluation.cost_estimate import CostEstimate
from msn_eval.probes import distributed as worker_group
from msn_eval.probes import knn
from msn_eval.probes.logistic_solvers import newton
from msn_eval.results.folder import list_results, read_results

TINY = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return [
        "--checkpoint", "pixels", "--data", "digits", "--subset", "1img@1", "--probe", "ncm", "--device", "cpu",
        "--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip


def test_dry_run_prints_the_plan_and_computes_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "results    1 for 1 checkpoint, into " in plan
    assert "checkpoint pixels: 807 images to read (154,944 bytes, 1 pass), 0 features to reuse, about " in plan
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def misfit(command: list[str], tmp_path: Path) -> list[str]:
    """Return a command for a file that lacks a weight."""
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=1).state_dict()
    del weights["norm.bias"]
    torch.save(weights, tmp_path / "misfit.pth")
    return ["--checkpoint", str(tmp_path / "misfit.pth"), *command[2:]]


def test_refused_checkpoint_is_reported_once(misfit: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(misfit) == 20
    assert capsys.readouterr().err.count("weights does not fit") == 1


def test_refused_checkpoint_beside_others_is_in_the_table_and_reported_once(
    misfit: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*misfit, "--checkpoint", "pixels"])

    printed = capsys.readouterr()
    assert (code, printed.err.count("weights does not fit"), printed.out.count("weights does not fit")) == (20, 1, 0)
    assert re.search(r"^misfit +REFUSED$", printed.out, re.MULTILINE)


def test_dry_run_ends_as_the_run_for_a_refused_checkpoint(
    misfit: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*misfit, "--dry-run"]) == 20
    assert "weights does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], ["--arch", "--allow-missing"]),
        (["--arch", "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"], ["--allow-missing"]),
        (["--allow-missing", "head.*"], ["--arch"]),
    ],
    ids=["nothing", "arch", "allow-missing"],
)
def test_hint_names_the_options_that_were_not_given(
    misfit: list[str], capsys: pytest.CaptureFixture[str], given: list[str], named: list[str]
) -> None:
    main([*misfit, *given])
    error = capsys.readouterr().err
    assert [option for option in ("--arch", "--allow-missing") if option in error] == named


def test_run_prints_the_plan_first(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(command)
    log = capsys.readouterr().err
    assert log.index("807 images to read") < log.index("features of 807 images in")


def test_repeated_options_add_up(command: list[str], tmp_path: Path) -> None:
    more = ["--subset", "2imgs@1", "--probe", "logistic,knn", "--lambda", "1", "--lambda", "2", "--k", "1", "--k", "3"]
    assert main([*command, *more, "--temperature", "0.1", "--temperature", "0.2"]) == 0

    results = list_results([tmp_path / "runs"])
    measured = [(result.split.subset, result.probe.name, *result.probe.params.values()) for result in results]
    knn = [("knn", k, temperature) for k in (1, 3) for temperature in (0.1, 0.2)]
    probes = [("ncm",), ("logistic", 1.0), ("logistic", 2.0), *knn]
    assert sorted(measured) == sorted((subset, *probe) for subset in ("1img", "2imgs") for probe in probes)


def test_second_probe_reuses_the_features(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(command)
    capsys.readouterr()
    main([*command, "--probe", "ncm,knn"])
    text = "1 result finished before, 0 images to read (0 bytes, 0 passes), 807 features to reuse"
    assert text in capsys.readouterr().err


def test_record_has_throughput_and_shares_of_time(command: list[str], tmp_path: Path) -> None:
    main([*command, "--checkpoint", TINY])
    times = [json.loads(path.read_text())["timing_s"] for path in (tmp_path / "runs").glob("*.json")]
    for timing in times:
        assert timing["images_per_second"] > 0
        assert 0 < timing["decode_share"] + timing["encode_share"] <= 1


def test_cached_and_uncached_runs_give_the_same_predictions(command: list[str], tmp_path: Path) -> None:
    for out, options in (("first", []), ("cached", []), ("uncached", ["--no-cache"])):
        main([*command, "--out", str(tmp_path / out), *options])
    first, cached, uncached = (
        next((tmp_path / out).glob("*.npz")).read_bytes() for out in ("first", "cached", "uncached")
    )
    assert first == cached == uncached


def test_costs_of_several_checkpoints_are_summed() -> None:
    text = describe_costs(
        [
            CostEstimate(name="a", read=100, reused=5, bytes=1000, seconds=60.0),
            CostEstimate(name="b", read=0, reused=105, finished=3),
            CostEstimate(name="c", problem="no such file"),
        ],
        ranks=2,
    )
    assert text.splitlines() == [
        "checkpoint a: 100 images to read (1,000 bytes, 1 pass), 5 features to reuse, about 30 s",
        "checkpoint b: 3 results finished before, 0 images to read (0 bytes, 0 passes), 105 features to reuse",
        "checkpoint c: would be refused: no such file",
        "total      3 results finished before, 100 images to read (1,000 bytes, 1 pass), 110 features to reuse, about 30 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89.4, "89 s"), (90.0, "2 min"), (5900.0, "98 min"), (7300.0, "2 h")]
)
def test_duration_has_a_suitable_unit(seconds: float, text: str) -> None:
    assert describe_costs([CostEstimate(name="a", read=1, seconds=seconds)]).endswith(f"about {text}")


@pytest.mark.parametrize("slurm", [["--slurm", "partition=gpu,nodes=2"], ["--slurm=partition=gpu,nodes=2"]])
def test_slurm_gets_the_command_without_itself(
    command: list[str], slurm: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = []

    def record(text: str, config: EvaluationConfig, arguments: list[str]) -> int:
        submitted.append((text, config.out, arguments))
        return 0

    monkeypatch.setattr(evaluate, "_submit", record)
    assert main([*command[:4], *slurm, *command[4:]]) == 0
    assert submitted == [("partition=gpu,nodes=2", str(tmp_path / "runs"), command)]


def test_slurm_checks_the_command_before_it_is_submitted(command: list[str]) -> None:
    assert main([*command, "--probe", "nmc", "--slurm", "partition=gpu"]) == 2


_LAUNCH = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from msn_eval.cli import main

def run_rank(arguments):
    if code := main(arguments):
        raise SystemExit(code)

rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", max_restarts=0, **rendezvous)
elastic_launch(config, run_rank)(sys.argv[1:])
"""  # torchrun with forked ranks, which start faster


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


def test_ranks_give_the_results_that_one_process_gives(
    command: list[str], tmp_path: Path, run_script: Callable[..., tuple[int, str]]
) -> None:
    command = [*command, "--checkpoint", TINY, "--batch-size", "64"]
    (tmp_path / "launch.py").write_text(_LAUNCH)
    folders = {
        name: ["--out", str(tmp_path / name), "--cache", str(tmp_path / f"cache {name}")] for name in ("alone", "ranks")
    }

    assert main([*command, *folders["alone"]]) == 0
    code, output = run_script(tmp_path / "launch.py", *command, *folders["ranks"])

    assert code == 0, output
    assert output.count("Top-1 accuracy") == 1  # ranks that did not meet would both print it
    assert read_files(tmp_path / "alone") == read_files(tmp_path / "ranks")


def test_ranks_share_neighbours_and_a_chunked_fit_under_a_launcher(
    command: list[str], tmp_path: Path, run_script: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_SHARED_VALUES", 0)
    monkeypatch.setattr(newton, "_WHOLE_BYTES", 0)
    arguments = ["--checkpoint", TINY, *command[2:], "--probe", "knn,logistic", "--k", "5", "--batch-size", "64"]
    (tmp_path / "launch.py").write_text(_LAUNCH)
    folders = {name: ["--out", str(tmp_path / name)] for name in ("alone", "ranks")}

    assert main([*arguments, *folders["alone"]]) == 0
    serving = {name: getattr(worker_group, name) for name in ("_serve_search", "_serve_fit")}
    for name, do in serving.items():
        monkeypatch.setattr(
            worker_group, name, lambda *given, name=name, do=do, **named: (print(name, flush=True), do(*given, **named))
        )
    code, output = run_script(tmp_path / "launch.py", *arguments, *folders["ranks"])

    assert code == 0, output
    assert [output.count(name) for name in serving] == [1, 1]
    for path in (tmp_path / "alone").glob("*.npz"):
        with np.load(path) as alone, np.load(tmp_path / "ranks" / path.name) as shared:
            for name, values in alone.items():  # the ranks' sums are rounded differently, which probabilities show
                if values.dtype == np.float32:
                    np.testing.assert_allclose(shared[name], values, rtol=1e-3)
                else:
                    np.testing.assert_array_equal(shared[name], values)


@pytest.mark.parametrize("probe", ["logistic", "knn", "ncm"])
def test_single_class_is_refused(tmp_path: Path, probe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (tmp_path / "data" / split / "only").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "data" / split / "only" / "a.png")
    arguments = ["--checkpoint", "pixels", "--data", str(tmp_path / "data"), "--subset", "1img@1", "--k", "1"]
    assert main([*arguments, "--probe", probe, "--out", str(tmp_path / "runs"), "--no-cache"]) == 23
    assert "single class 'only'" in capsys.readouterr().err


def test_own_network_whose_helper_changed_is_measured_again(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "network_of_mine.py").write_text(
        "import torch, helper_of_mine\n"
        "class Mine(torch.nn.Module):\n"
        "    image_pixels = 8\n"
        "    def forward(self, images): return helper_of_mine.change(images.flatten(1))\n"
        "def make(): return Mine()\n"
    )
    arguments = [*command, "--checkpoint", "py:network_of_mine:make"]
    records = []
    for change in ("rows", "rows[:, :20]"):
        (tmp_path / "helper_of_mine.py").write_text(f"def change(rows): return {change}\n")
        for name in ("network_of_mine", "helper_of_mine"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        assert main(arguments) == 0
        records.append({path.name for path in (tmp_path / "runs").glob("*.json")})
    for name in ("network_of_mine", "helper_of_mine"):
        sys.modules.pop(name, None)
    assert (len(records[0]), len(records[1])) == (2, 3)


def test_checkpoint_is_read_once_for_the_plan_and_the_run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msn_eval.evaluation.evaluate.prepare", lambda *given: pytest.fail("it was read again"))
    assert main(command) == 0


@pytest.fixture
def as_second_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that makes this process the second of two ranks, without a connection to the first."""
    group = Group(rank=1, world=2, local_rank=1, host="localhost")

    def become() -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr("msn_eval.distributed.group.join_group", lambda: contextlib.nullcontext(group))

    return become


@pytest.mark.parametrize("more", [[], ["--json"]], ids=str)
def test_second_rank_is_silent(
    command: list[str], more: list[str], as_second_rank: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    main(command)
    capsys.readouterr()
    as_second_rank()
    assert (main([*command, *more]), *capsys.readouterr()) == (0, "", "")


def test_second_rank_uses_the_second_gpu(
    command: list[str], as_second_rank: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    local_ranks: list[int | None] = []

    def refuse(config: EvaluationConfig, *, local_rank: int | None) -> None:
        local_ranks.append(local_rank)
        raise UsageError("stop", hint="")

    monkeypatch.setattr("msn_eval.evaluation.plan.make_plan", refuse)
    as_second_rank()
    assert (main(command), local_ranks) == (2, [1])


def test_second_name_of_the_same_weights_finds_the_results_of_the_first(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = read_checkpoint(TINY).network.state_dict()
    for name in ("one.pth", "other.pth"):
        torch.save(weights, tmp_path / name)
    named = ["--checkpoint", str(tmp_path / "one.pth"), "--checkpoint", str(tmp_path / "other.pth")]
    arch = ["--arch", TINY.removeprefix("random:")]
    assert main([*named, *command[2:], *arch]) == 0
    (record,) = (tmp_path / "runs").glob("*.json")
    assert json.loads(record.read_text())["checkpoint"]["name"] == "one"
    assert "other: 1 finished result in" in capsys.readouterr().err


def test_checkpoint_is_called_by_its_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "runs")
    labels = ["--checkpoint", "first=pixels", "--checkpoint", "second=demo", "--data", "digits", "--device", "cpu"]

    assert main([*labels, "--subset", "1img@1", "--probe", "ncm", "--no-cache", "--out", out]) == 0

    assert set(read_results(out)["checkpoint.name"]) == {"first", "second"}
    assert "first" in capsys.readouterr().out
