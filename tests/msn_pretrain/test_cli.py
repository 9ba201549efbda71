import json
import re
import signal
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.cli import main as msn_eval
from msn_eval.distributed.slurm import Submitted
from msn_pretrain.cli import main
from msn_pretrain.training import train as training
from msn_pretrain.training.journal import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(
        "run: {device: cpu}\ndata: {root: digits, workers: 0, limit: 2}\n"
        "views: {image_pixels: 16, focal_pixels: 8, focal_views: 1}\n"
        "encoder: {name: 'vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=1&num_heads=2'}\n"
        "head: {hidden: 16, output: 8}\ncriterion: {prototypes: 8}\n"
        "optimization: {epochs: 1, batch_size: 10, warmup: 0}\n"
    )
    assert main([str(folder / "tiny.yaml"), f"run.dir={folder / 'run'}", "-q"]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere.yaml"], 2, "no such recipe"),
        (["msn_vits61"], 2, "no such recipe. Did you mean msn_vits16?"),
        (["configs/pretrain/msn_vitb16.yml"], 2, "Did you mean"),
        ([], 2, "required"),
        (["msn_digits", "optimization.epoch=3"], 2, "Did you mean optimization.epochs?"),
        (["msn_digits", "--dry-runs"], 2, "Did you mean --dry-run?"),
        (["msn_digits", "epochs"], 2, "unexpected argument 'epochs'"),
        (["msn_vits16"], 2, "data.root is missing"),
        (["msn_vits16", "data.root=/nowhere"], 21, "/nowhere"),
        (["msn_digits", "data.root='wds:'"], 2, "data.root wds:: a folder or a name is missing"),
        (["msn_digits", "data.root=digits:3"], 2, "data.root digits:3: the digits are embedded"),
        (["msn_vits16", "data.root=/nowhere"], 21, "Give a folder that exists, or another data set."),
        (["bench", "msn_vits16", "data.root=/nowhere"], 21, "Give a folder that exists, or another data set."),
        (["msn_digits", "run.device=cuda:77"], 2, "run.device cuda:77 does not exist"),
        (["msn_digits", "--slurm", "partitoin=gpu"], 2, "Did you mean partition?"),
        (["export", "/nowhere", "--to", "timm", "--out", "x"], 2, "not the folder of a pre-training run"),
        (["bench", "msn_digits", "--steps", "0"], 2, "out of range"),
    ],
)
def test_mistakes_have_a_message_and_an_exit_code(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code

    output = capsys.readouterr()
    assert text in output.err
    assert output.out == ""


def test_dry_run_describes_the_training_and_trains_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["msn_digits", f"run.dir={tmp_path / 'run'}", "--dry-run"]) == 0

    output = capsys.readouterr().out
    assert "epochs:" in output
    assert "images      1,000 for training, from digits" in output
    assert "parameters" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optimization.batch_size=1001", "a batch of 1001 images is impossible with 1,000 images"),
        ("run.device=cuda:77", "run.device cuda:77 does not exist"),
        ("run.device=cpu,cpu,cpu", "a global batch of 64 cannot be divided by 3 ranks"),
        ("run.device=cpu,auto", "auto among several"),
    ],
)
def test_dry_run_refuses_what_the_run_refuses(
    override: str, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["msn_digits", f"run.dir={tmp_path / 'run'}", override, "--dry-run"]) == 2

    output = capsys.readouterr()
    assert text in output.err
    assert output.out == ""


@pytest.mark.parametrize(("option", "code"), [([], 2), (["--allow-config-change", "run.seed"], 0)])
def test_dry_run_refuses_a_changed_recipe_in_the_folder_of_a_run(
    run: Path, option: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run.parent / "tiny.yaml"), f"run.dir={run}", "run.seed=5", *option, "--dry-run"]

    assert main(arguments) == code

    assert ("run.seed: folder 0, now 5" in capsys.readouterr().err) == (code == 2)


def test_dry_run_of_a_slurm_job_does_not_need_its_devices_here(run: Path, tmp_path: Path) -> None:
    arguments = [str(run.parent / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", "run.device=cuda:77", "--dry-run"]

    assert main([*arguments, "--slurm", "cluster=local"]) == 0


def test_mistyped_file_suggests_its_neighbour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small_run.yaml").touch()

    assert main([str(tmp_path / "smal_run.yaml")]) == 2

    assert f"no such recipe. Did you mean {tmp_path / 'small_run.yaml'}?" in capsys.readouterr().err


def test_an_interrupted_bench_promises_no_snapshot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(recipe: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("msn_pretrain.benchmark.training_images", interrupt)

    assert main(["bench", "msn_digits"]) == 130

    assert capsys.readouterr().err == "Interrupted. Nothing was written.\n"


def test_training_keeps_freed_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("msn_pretrain.cli.keep_freed_memory", lambda: calls.append(1))

    assert main([str(run.parent / "tiny.yaml"), f"run.dir={run}"]) == 0

    assert calls == [1]


def test_finished_run_has_nothing_left_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()

    assert main([str(run.parent / "tiny.yaml"), f"run.dir={run}"]) == 0

    assert (run / "metrics.jsonl").read_bytes() == before
    assert "trained to its end" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["training_images", "build_learner", "open_run", "open_journal"])
def test_sigterm_during_start_up_trains_no_step_and_the_run_can_start_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    arguments = [str(run.parent / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", "-q"]
    begin = getattr(training, stage)

    def stop(*arguments: object, **options: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return begin(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(training, stage, stop)
        assert main(arguments) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/metrics.jsonl"))
    assert not list(tmp_path.glob("run/checkpoints/*"))

    assert main(arguments) == 0

    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0] != []


def test_slurm_gets_the_command_without_the_option_and_writes_its_logs_into_the_run_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run.parent / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", "run.seed=4"]
    submitted = []

    def record(arguments: list[str], options: dict[str, object], **settings: object) -> Submitted:
        submitted.append((arguments, options["cluster"], settings))
        return Submitted(job=cast(Any, None), job_id="17", logs=(tmp_path / "17.out",))

    monkeypatch.setattr("msn_eval.distributed.slurm.submit", record)
    assert main([arguments[0], "--slurm", "cluster=local", *arguments[1:]]) == 0

    command = (sys.executable, "-m", "msn_pretrain")
    assert submitted == [(arguments, "local", {"folder": tmp_path / "run" / "slurm", "command": command})]
    assert f"submitted job 17; its output: {tmp_path / '17.out'}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_run_folder_is_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--subset", "1img@1", "--limit", "3", "--device", "cpu", "--no-cache", "-q"]

    assert msn_eval(["--checkpoint", str(run), *arguments, "--out", str(tmp_path)]) == 0

    assert re.search(r"^run +\d+\.\d$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(("to", "name"), [("timm", "x.safetensors"), ("hf", "folder"), ("msn", "x.pth.tar")])
def test_exported_encoder_has_the_same_weights(run: Path, tmp_path: Path, to: str, name: str) -> None:
    arguments = ["export", str(run), "--to", to, "--out", str(tmp_path / name)]
    assert main(arguments) == 0

    original = read_checkpoint(str(run))
    exported = read_checkpoint(str(tmp_path / name), arch=original.arch if to == "msn" else None)

    torch.testing.assert_close(exported.network.state_dict(), original.network.state_dict(), rtol=0, atol=0)
    assert main(arguments) == 2


def test_transformer_cannot_be_exported_to_torchvision(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["export", str(run), "--to", "torchvision", "--out", str(tmp_path / "x.pth")]) == 20

    assert "not a residual network" in capsys.readouterr().err


def test_bench_prints_speed_parts_of_a_step_and_share_of_the_peak(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"

    assert main(["bench", str(run.parent / "tiny.yaml"), "--steps", "2", "--profile", str(trace)]) == 0

    printed = capsys.readouterr().out
    assert "images/s on cpu in fp32" in printed
    parts = re.findall(r"(data|forward|backward|communication|optimiser) [\d.]+ s \((\d+)%\)", printed)
    assert [name for name, _ in parts] == ["data", "forward", "backward", "communication", "optimiser"]
    assert sum(int(share) for _, share in parts) == pytest.approx(100, abs=3)
    assert re.search(r"[1-9]\d* GFLOP/s|\d+% of the [1-9][\d,]* of matrix products", printed)
    assert "aten::addmm" in {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
