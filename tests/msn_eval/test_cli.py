"""The command line, as a user types it."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msn_eval.cli import main
from msn_eval.commands import VERBS
from msn_eval.errors import UsageError
from msn_eval.program import run_program

Measure = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an image folder: a dark and a light class, with 6 train and 4 val images each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for label, name in enumerate(("dark", "light")):
            target = tmp_path / "data" / split / name
            target.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(100 * label, 100 * label + 120, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("MSN_EVAL_DATA", raising=False)


def _pixels(*more: str) -> list[str]:
    return ["--checkpoint", "pixels", "--device", "cpu", "--no-cache", *more]


@pytest.fixture
def measure(folder: Path, capsys: pytest.CaptureFixture[str]) -> Measure:
    """Return a function that measures the pixels of `folder` and returns the records that --json prints."""

    def run(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
        assert main([*_pixels("--data", str(folder)), *arguments, "--json"]) == code
        records: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return records

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--data", "digits"], 2, "no checkpoint given"),
        (_pixels(), 2, "no data set given"),
        (_pixels("--data", "nowhere"), 21, "nowhere"),
        (["--checkpoint", "gone.pth", "--data", "digits"], 20, "gone.pth"),
        (["--checkpoint", "random:vit_tny_patch16_224", "--data", "digits"], 20, "Did you mean vit_tiny_patch16_224?"),
        (_pixels("--data", "digits", "--subset", "5img"), 2, "Did you mean 5imgs?"),
        (_pixels("--data", "digits", "--subset", "5imgs@7"), 2, "no draw '7'"),
        (_pixels("--data", "digits", "--probe", "logistc"), 2, "Did you mean logistic?"),
        (_pixels("--data", "digits", "--probe", "knn", "--subset", "1img", "--k", "50"), 23, "k = 50"),
        (_pixels("--data", "digits", "--k", "many"), 2, "'many'"),
        (_pixels("--data", "digits", "--k", "0"), 2, "--k 0"),
        (_pixels("--data", "digits", "--lambda", "-1"), 2, "--lambda -1.0"),
        (_pixels("--data", "digits", "--temperature", "nan"), 2, "--temperature nan"),
        (_pixels("--data", "digits", "--limit", "0"), 2, "--limit 0"),
        (_pixels("--data", "digits", "--seed", str(2**64)), 2, "--seed 18446744073709551616"),
        (_pixels("--data", "digits", "--subset", "1img@1", "--out", 300 * "x"), 2, "File name too long"),
        (_pixels("--data", "digits", "--batch-size", "none"), 2, "--batch-size none"),
        (_pixels("--data", "digits", "--device", "gpu"), 2, "--device gpu"),
        (_pixels("--data", "digits", "--precision", "int8"), 2, "--precision: cannot be 'int8'"),
        (_pixels("--data", "digits", "--tap", "cls"), 2, "It has: pixels."),
        (_pixels("--data", "digits", "--config", "nowhere.yaml"), 2, "nowhere.yaml"),
        (_pixels("--data", "digits", "--config", "mine/low_shot.yaml"), 2, "mine/low_shot.yaml"),
        (_pixels("--data", "digits", "limt=3"), 2, "Did you mean limit?"),
        (_pixels("--chekpoint", "x"), 2, "Did you mean --checkpoint?"),
        (_pixels("--subse", "1img"), 2, "Did you mean --subset?"),
        (["repot", "runs"], 2, "Did you mean report?"),
        (_pixels("--ranks"), 2, "unknown option --ranks.\nIt is an option of msn-eval report."),
        (
            ["verify", "runs", "--max-bytes=3"],
            2,
            "unknown option --max-bytes.\nIt is an option of msn-eval cache prune.",
        ),
        (["report", "runs", "--nothing"], 2, "unknown option --nothing.\nSee msn-eval report --help."),
        (["report", "nowhere"], 2, "nowhere"),
        (["ls", "nothing"], 2, "nothing"),
        (["help", "verfy"], 2, "Did you mean verify?"),
        (["pixels"], 2, "given as --checkpoint pixels"),
        (["--data", "digits", "report", "runs"], 2, "Type: msn-eval report runs"),
        (["--columns", "ece", "report", "runs"], 2, "Type: msn-eval report --columns ece runs"),
        (["--out", "report", "report", "report"], 2, "Type: msn-eval report --out report report"),
        (
            _pixels("--data", "digits", "--k", "2.5"),
            2,
            "--k: cannot be '2.5'\nGive whole numbers, separated by commas.",
        ),
        (_pixels("--data", "digits", "limit=few"), 2, "limit: cannot be 'few'\nGive a whole number."),
        (
            _pixels("--data", "digits", "--out", "list.csv", "--dry-run"),
            2,
            "Give another --out folder. Tables are printed by",
        ),
    ],
)
def test_a_mistake_has_a_message_and_an_exit_code_and_writes_no_files(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = main(arguments)

    output = capsys.readouterr().err
    assert (ended, text in output) == (code, True), output
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--checkpoint", "nothing.pth", "--data", "digits"], 20),
        (["--checkpoint", "pixels", "--chekpoint", "x"], 2),
        (["--checkpoint", "pixels", "limt=3"], 2),
        (["repot", "runs"], 2),
    ],
)
def test_help_and_typos_are_answered_without_importing_torch(arguments: list[str], code: int) -> None:
    program = "import sys; from msn_eval.cli import main\ntry: code = main(sys.argv[1:])\nexcept SystemExit: code = 0\n"
    program += "print(code, {'torch', 'timm', 'pandas'} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == f"{code} set()"


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["help"], "usage: msn-eval --checkpoint X"),
        (["help", "verify"], "usage: msn-eval verify"),
        (["-q", "help", "cache"], "usage: msn-eval cache"),
    ],
)
def test_help_of_a_verb_is_its_own_help(arguments: list[str], usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert (ended.value.code, capsys.readouterr().out.startswith(usage)) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--data", "x", "report", "runs"], "msn-eval report runs"),
        (["--data=x", "--json", "-q", "report", "runs"], "msn-eval report -q runs"),
        (["--probe", "knn", "report", "runs"], "msn-eval report --probe knn runs"),
        (["--limit", "3", "cache", "list"], "msn-eval cache list"),
    ],
)
def test_verb_after_options_is_answered_by_a_command_that_it_takes(
    arguments: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"Type: {command}"


def test_help_starts_with_every_verb_and_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])

    head, _, options = capsys.readouterr().out.partition("options:")
    assert all(f"\n  {verb} " in head for verb in VERBS)
    assert head.partition("examples:")[2].count("\n  msn-eval ") == 3
    assert "--checkpoint" in options


@pytest.mark.parametrize("option", ["-v", "-vv", "--verbose", "-q"])
def test_verbosity_may_be_before_the_verb(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([option, "ls"]) == 0
    assert capsys.readouterr().out.startswith("checkpoints\t")


def test_a_run_says_what_it_evaluates_before_torch_is_imported() -> None:
    program = (
        "import sys; from msn_eval.cli import main\n"
        "class Stream:\n"
        "    def write(self, text): print(text, 'torch' in sys.modules); sys.stdout.flush(); raise SystemExit\n"
        "    def flush(self): pass\n"
        "sys.stderr = Stream()\n"
        "main(['--checkpoint', 'pixels', '--data', 'digits', '--subset', '1img'])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert done.stdout == "evaluating pixels on digits: 1img by logistic\n False\n"


def test_an_error_is_one_block_with_a_traceback_only_if_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    main(_pixels("--data", "nowhere"))
    output = capsys.readouterr().err
    main(_pixels("--data", "nowhere", "-vv"))

    assert "Traceback" not in output
    assert len(output.splitlines()) <= 12
    assert "Traceback" in capsys.readouterr().err


def test_line_ends_in_names_do_not_break_log_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def log() -> int:
        logging.getLogger("msn_eval").warning("%s: %s, %s", Path("a\nb"), "c\nd", UsageError("wrong", hint="Hint."))
        return 0

    options = Namespace(verbose=0, quiet=False)
    run_program("msn-eval", (), lambda arguments: (options, log), loggers=("msn_eval",), kept="")

    assert capsys.readouterr().err == "a\\nb: c\\nd, wrong\nHint.\n"


def test_torchrun_is_told_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    assert main(["--checkpoint", "pixels", "--data", "/nowhere"]) == 21

    shown = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert shown.startswith("msn_eval.errors.DataError: /nowhere: the data folder does not exist\n")


def test_json_output_is_only_a_list_of_records(measure: Measure) -> None:
    assert [record["split"]["draw"] for record in measure("--subset", "2imgs")] == [1, 2, 3]


def test_a_record_has_the_promised_fields(measure: Measure) -> None:
    (record,) = measure("--subset", "2imgs@1")

    fields = {
        name: sorted(value) if isinstance(value, dict) and name != "protocol" else None
        for name, value in record.items()
    }
    assert fields == {
        "schema": None, "id": None, "status": None, "error": None, "created": None, "protocol_id": None, "protocol": None,
        "checkpoint": [
            "allow_missing", "arch", "epoch", "format", "key", "matched", "name", "params", "path", "sha256", "weights_sha256",
        ],
        "data": ["class_map_sha256", "classes", "name", "sha256", "skipped", "val_images"],
        "split": ["draw", "images", "overlap", "sha256", "subset"],
        "features": ["alpha", "decoder", "degenerate", "dim", "precision", "rankme", "spectrum_images", "tap", "transform"],
        "probe": ["certificate", "chosen", "converged", "iterations", "name", "objective", "params", "solver", "version"],
        "metrics": ["brier", "ece", "n", "nll", "top1", "top1_ci95", "top5"],
        "timing_s": ["decode_share", "encode_share", "extract", "images_per_second", "probe", "total"],
        "environment": [
                "batch_size", "device", "git", "numpy", "os", "package", "processor", "python", "seed", "timm", "torch",
                "torchvision",
            ],
        "predictions": None, "predictions_sha256": None, "seal": None,
    }  # fmt: skip


def _results() -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("runs").iterdir()}


def test_a_second_run_computes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _pixels("--data", str(folder), "--subset", "2imgs")
    main(arguments)
    before = _results()
    capsys.readouterr()

    main(arguments)

    assert "nothing computed" in capsys.readouterr().err
    assert before == _results()


def test_a_second_run_only_adds_what_is_missing(folder: Path) -> None:
    main(_pixels("--data", str(folder), "--subset", "1img"))
    before = _results()

    main(_pixels("--data", str(folder), "--subset", "1img,2imgs"))

    after = _results()
    assert len(after) == 2 * len(before)
    assert before.items() <= after.items()


def test_the_same_weights_under_two_names_are_counted_once(measure: Measure) -> None:
    assert len(measure("--checkpoint", "pixels", "--subset", "2imgs")) == 3


def test_no_k_that_fits_is_an_error_and_not_an_empty_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(_pixels("--data", str(folder), "--subset", "1img", "--probe", "knn"))

    assert (code, "nothing to measure" in capsys.readouterr().err) == (23, True)


def test_dry_run_prints_the_plan_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(_pixels("--data", str(folder), "--subset", "5imgs", "--dry-run"))

    assert code == 0
    assert "8 validation images" in capsys.readouterr().out
    assert list(Path.cwd().iterdir()) == []


def test_the_data_variable_replaces_the_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSN_EVAL_DATA", str(folder))

    assert main(_pixels("--subset", "1img", "-q")) == 0


def test_overrides_win_over_options_and_options_over_the_config_file(measure: Measure) -> None:
    Path("my.yaml").write_text("probe: [knn]\nk: [1]\nlimit: 1\nsubset: 2imgs@1\n")

    (record,) = measure("--config", "my.yaml", "--k", "2", "limit=3")

    assert (record["probe"]["params"]["k"], record["protocol"]["limit"]) == (2, 3)


def test_limit_counts_images_per_class_and_is_in_the_record(measure: Measure) -> None:
    (record,) = measure("--subset", "1img@1", "--limit", "2")

    assert (record["data"]["val_images"], record["metrics"]["n"]) == (4, 4)


def test_bad_images_of_every_kind_and_split_are_listed_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = folder / "val" / "dark"
    (val / "empty.png").touch()
    (val / "loop.png").symlink_to("loop.png")
    (val / "gone.png").symlink_to("nowhere")
    (val / "null.png").symlink_to("/dev/null")
    (val / "folder.png").mkdir()
    os.mkfifo(val / "pipe.png")
    (folder / "train" / "light" / "text.png").write_text("text")

    code = main(_pixels("--data", str(folder), "--subset", "full", "--no-cache"))

    listed = [line.split(": ")[0].strip() for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    bad = [str(val / f"{name}.png") for name in ("empty", "folder", "gone", "loop", "null", "pipe")]
    assert (code, listed) == (21, [str(folder / "train" / "light" / "text.png"), *bad])


def test_undecodable_images_of_both_splits_are_listed_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [folder / "train" / "dark" / "0.png", folder / "val" / "light" / "3.png"]
    for path in bad:
        path.write_bytes(b"\x89PNG\r\n\x1a\nbroken")

    code = main(_pixels("--data", str(folder), "--subset", "full"))

    error = capsys.readouterr().err
    assert (code, [str(path) in error for path in bad]) == (21, [True, True])


def test_every_unreadable_image_is_listed_without_an_accuracy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dark/0.png", "light/3.png"):
        (folder / "val" / name).write_bytes(b"\x89PNG\r\n\x1a\nbroken")

    code = main(_pixels("--data", str(folder), "--subset", "1img"))

    output = capsys.readouterr()
    assert code == 21
    assert ("val/dark/0.png" in output.err, "val/light/3.png" in output.err, output.out) == (True, True, "")
    assert list(Path("runs").glob("*.json")) == []


def test_skipped_images_are_counted_and_change_the_protocol(folder: Path, measure: Measure) -> None:
    (complete,) = measure("--subset", "1img@1")
    (folder / "val/dark/0.png").write_bytes(b"broken")

    (record,) = measure("--subset", "1img@1", "--on-bad-image", "skip")

    assert (record["data"]["skipped"], record["metrics"]["n"]) == (1, 7)
    assert record["protocol_id"] != complete["protocol_id"]


def test_the_next_image_of_the_draw_replaces_an_unreadable_labelled_one(
    folder: Path, measure: Measure, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["subsets", "draw", "--data", str(folder), "--subset", "1img@1"])
    first = capsys.readouterr().out.split()[0]
    (folder / "train" / first).write_bytes(b"broken")

    (record,) = measure("--subset", "1img@1", "--on-bad-image", "skip")

    assert (record["split"]["images"], record["data"]["skipped"]) == (2, 1)


def test_classes_that_differ_between_splits_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "val/light").rename(folder / "val/bright")

    code = main(_pixels("--data", str(folder), "--subset", "1img"))

    output = capsys.readouterr().err
    assert (code, "light" in output, "bright" in output) == (21, True, True)


def test_other_checkpoints_are_measured_when_one_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("page.pth").write_text("<html>not found</html>")

    code = main(["--checkpoint", "page.pth", *_pixels("--data", str(folder), "--subset", "1img@1", "--json")])

    output = capsys.readouterr()
    assert (code, "page.pth" in output.err) == (20, True)
    assert [record["checkpoint"]["name"] for record in json.loads(output.out)] == ["pixels"]


def test_features_that_are_not_finite_give_a_failed_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken_encoder.py").write_text(
        "import torch\n"
        "class Broken(torch.nn.Module):\n"
        "    image_pixels = 8\n"
        "    def forward(self, images): return images.flatten(1) / 0\n"
        "def make(): return Broken()\n"
    )

    code = main(
        ["--checkpoint", "py:broken_encoder:make", "--data", str(folder), "--subset", "1img@1", "--no-cache", "--json"]
    )

    (record,) = json.loads(capsys.readouterr().out)
    assert (code, record["status"], record["metrics"], record["predictions"]) == (23, "failed", None, None)
    assert "not finite" in record["error"]


def test_the_same_weights_with_a_different_arch_do_not_reuse_the_result(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import save_file
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    network = VisionTransformer(img_size=16, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=0)
    save_file(network.state_dict(), "small.safetensors")
    common = ["--checkpoint", "small.safetensors", "--data", str(folder), "--subset", "1img@1", "--no-cache", "-q"]
    name = "vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=48&depth=1&num_heads="
    main([*common, "--arch", f"{name}3"])

    code = main([*common, "--arch", f"{name}4"])

    output = capsys.readouterr().err
    assert (code, f"architecture: {name}3 -> {name}4" in output, "transform" in output) == (22, True, False), output


def test_a_result_with_different_labelled_images_is_not_reused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(_pixels("--data", str(folder), "--subset", "full", "-q"))
    Image.new("RGB", (20, 24), (9, 9, 9)).save(folder / "train/dark/0.png")

    code = main(_pixels("--data", str(folder), "--subset", "full", "-q"))

    assert (code, "different labelled images" in capsys.readouterr().err) == (22, True)


def test_a_damaged_record_is_named_and_measured_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(_pixels("--data", str(folder), "--subset", "1img@1", "-q"))
    (record,) = Path("runs").glob("*.json")
    record.write_bytes(record.read_bytes()[:100])

    code = main(_pixels("--data", str(folder), "--subset", "1img@1"))

    assert (code, record.name in capsys.readouterr().err) == (0, True)
    assert main(["verify", "runs", "-q"]) == 0


def test_closed_output_is_not_an_error(digits_runs: Path) -> None:
    command = f"{sys.executable} -m msn_eval report {digits_runs} --format json | head -c 1; exit ${{PIPESTATUS[0]}}"

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("redirection", "code", "text"),
    [(">/dev/full", 22, "standard output"), (">&-", 22, "standard output is closed"), ("2>&-", 0, "")],
)
def test_output_that_cannot_be_written_has_its_exit_code(redirection: str, code: int, text: str) -> None:
    command = f"{sys.executable} -m msn_eval ls probes {redirection}"

    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    assert (done.returncode, text in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError("x"), 30, "out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            30,
            "out of memory",
        ),
        (RuntimeError("can't start new thread"), 30, "out of processes or threads"),
        (OSError(errno.EMFILE, "Too many open files", "a.png"), 30, "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device"), 22, "No space left"),
        (ValueError("x"), 1, "bug"),
    ],
)
def test_exhausted_resource_is_named_with_its_exit_code(
    error: Exception, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object, overrides: object) -> int:
        raise error

    monkeypatch.setattr("msn_eval.commands.ls.run", fail)

    assert main(["ls", "probes"]) == code
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["subsets", "-v", "list", "-q"], ["subsets", "list", "-vv"]])
def test_verbosity_may_be_before_and_after_an_action(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0, capsys.readouterr().err


def test_file_as_out_is_a_usage_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").write_text("")

    assert main(_pixels("--data", str(folder), "--subset", "1img@1")) == 2
    assert "runs: is the name of a file, not of a folder\n" in capsys.readouterr().err


def test_read_only_out_is_a_store_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("msn_eval.files.atomic.tempfile.TemporaryFile", refuse)  # root writes everywhere

    assert main(_pixels("--data", str(folder), "--subset", "1img@1")) == 22
    assert "runs: cannot be written: Read-only file system\nGive another --out folder." in capsys.readouterr().err


def test_what_a_checkpoint_prints_is_not_in_the_json(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("talking_encoder.py").write_text(
        "import os, torch\n"
        "print('import')\n"
        "class Talking(torch.nn.Module):\n"
        "    image_pixels = 8\n"
        "    def forward(self, images):\n"
        "        print('forward'); os.system('echo child')\n"
        "        return images.flatten(1)\n"
        "def make(): print('factory'); return Talking()\n"
    )
    arguments = ["--data", str(folder), "--subset", "1img@1", "--no-cache", "--json"]

    assert main(["--checkpoint", "py:talking_encoder:make", *arguments]) == 0

    output = capfd.readouterr()
    assert len(json.loads(output.out)) == 1
    assert all(word in output.err for word in ("import", "factory", "forward", "child"))


@pytest.fixture
def receive_interrupts() -> Iterator[None]:
    """Let new processes receive SIGINT, also when a shell runs these tests in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_has_its_exit_code_and_keeps_finished_results(
    number: signal.Signals, code: int, tmp_path: Path, receive_interrupts: None
) -> None:
    (tmp_path / "work" / "slow_encoder.py").write_text(
        "import time, torch\n"
        "class Slow(torch.nn.Module):\n"
        "    image_pixels = 8\n"
        "    def forward(self, images):\n"
        "        open('started', 'w').close(); time.sleep(0.5)\n"
        "        return images.flatten(1)\n"
        "def make(): return Slow()\n"
    )
    arguments = ["--data", "digits", "--subset", "1img@1", "--batch-size", "8", "--no-cache"]
    command = [sys.executable, "-m", "msn_eval", "--checkpoint", "pixels", "--checkpoint", "py:slow_encoder:make"]
    with subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        deadline = time.monotonic() + 120
        while not Path("started").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        output = process.communicate(timeout=60)[1]

    assert process.returncode == code, output
    assert "Traceback" not in output
    assert len(list(Path("runs").glob("*.json"))) == 1
    assert [path for path in Path("runs").iterdir() if path.suffix not in (".json", ".npz")] == []


@pytest.mark.parametrize(("options", "disabled"), [(["-q"], True), ([], False)])
def test_quiet_disables_the_progress_bars_of_libraries_that_download(
    options: list[str], disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in names})

    monkeypatch.setattr(sys, "argv", ["msn-eval", *options, "ls"])

    assert main() == 0
    assert [os.environ.get(name) for name in names] == [("1" if disabled else None)] * 2
