"""`msn-eval watch` on a small real run, which is trained once."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import msn_eval.monitor.trajectory
from msn_eval.checkpoints.run_folder import SnapshotFiles, file_sha256, format_metrics, read_metrics, snapshot_folders
from msn_eval.cli import main
from msn_eval.commands import watch as command
from msn_eval.distributed.group import Group as Group
from msn_eval.files.json_records import add_seal
from msn_eval.monitor.snapshot_features import read_snapshot_features
from msn_eval.reports.html import trajectory as trajectory_report
from msn_eval.results.folder import list_results
from msn_eval.results.record import read_result
from msn_pretrain.config.load import read_recipe
from msn_pretrain.training.train import train

_RECIPE = """
run: {device: cpu, log_every: 1, keep_every: 1}
data: {root: digits, workers: 0, limit: 4}
views: {image_pixels: 16, focal_pixels: 8, focal_views: 1, made: device}
encoder: {name: 'vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=16&depth=1&num_heads=2'}
head: {hidden: 16, output: 8}
masking: {ratio: 0.3}
criterion: {prototypes: 8}
optimization: {epochs: 3, batch_size: 20, warmup: 1}
watch: {subset: 1img@1}
"""
_DATA = ("--data", "digits", "--subset", "1img@1", "--probe", "ncm", "--limit", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of 6 steps on 40 digits, with a snapshot after every second step."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(_RECIPE)
    recipe = read_recipe(folder / "recipe.yaml", overrides=[f"run.dir={folder / 'tiny run'}"])
    assert train(recipe, Group(rank=0, world=1, device=torch.device("cpu")), quiet=True) == 0
    return folder / "tiny run"


@pytest.fixture(scope="module")
def watched(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the run that was watched once."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("watched") / "tiny run"))
    assert _once(run) == 0
    return run


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots, which take a second each, except in the test of the plot."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(trajectory_report, "render_plot", lambda *_: b"")


@pytest.fixture
def unscored(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run without scores."""
    return Path(shutil.copytree(trained, tmp_path / "tiny run"))


@pytest.fixture
def scored(watched: Path, tmp_path: Path) -> Path:
    """Return a copy of the run with scores."""
    return Path(shutil.copytree(watched, tmp_path / "run"))


def _watch(run: Path, *options: str) -> int:
    given = ["--device", "cpu", "--workers", "0", "--limit", "3", "--probe", "ncm", *options]
    return main(["watch", str(run), *given])


def _once(run: Path, *options: str) -> int:
    return _watch(run, "--once", *options)


def _follow(run: Path, *options: str) -> int:
    return _watch(run, "--every", "0.01", *options)


def _add_lines(run: Path, count: int, **numbers: Any) -> None:
    last = read_metrics(run / "metrics.jsonl")[0][-1]
    with (run / "metrics.jsonl").open("ab") as file:
        for number in range(1, count + 1):
            file.write(format_metrics({**last, **numbers, "step": last["step"] + number}))


def _page(run: Path) -> str:
    return (run / "eval" / "trajectory.html").read_text()


def _steps_on_page(run: Path) -> list[str]:
    return re.findall(r'<tr><th scope="row">(\d+)</th>', _page(run))


def _printed_steps(output: str) -> list[str]:
    return re.findall(r"^step (\d)", output, re.MULTILINE)


def test_every_snapshot_is_scored_in_ordinary_records(watched: Path) -> None:
    results = list_results([watched / "eval"])

    assert sorted(result.checkpoint.name for result in results) == [f"tiny run step {step}" for step in (2, 4, 6)]
    assert {(result.probe.name, result.split.subset, result.split.draw) for result in results} == {("ncm", "1img", 1)}
    assert not [path for path in (watched / "eval").iterdir() if path.name.startswith(".")]  # features are not kept
    assert main(["verify", str(watched / "eval")]) == 0


def test_a_record_is_the_one_of_evaluating_the_file(watched: Path, tmp_path: Path) -> None:
    encoder = watched / "checkpoints" / "step-00000004" / "encoder.safetensors"
    assert main(["--checkpoint", str(encoder), *_DATA, "--out", str(tmp_path), "--no-cache", "-q", "--json"]) == 0

    (expected,) = list_results([tmp_path])
    (record,) = [result for result in list_results([watched / "eval"]) if result.checkpoint.name.endswith(" 4")]
    assert (record.id, record.metrics) == (expected.id, expected.metrics)


def test_a_second_watch_computes_and_rewrites_nothing(
    watched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def content() -> dict[str, bytes]:
        files = (watched / "eval").iterdir()
        return {path.name: path.read_bytes() for path in files if not path.name.startswith("trajectory.")}

    before = content()
    monkeypatch.setattr(msn_eval.monitor.trajectory, "prepare", lambda *_: pytest.fail("a checkpoint was read again"))

    assert _once(watched) == 0

    assert content() == before
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["trajectory.html", "trajectory.png"]


def test_a_new_probe_is_measured_on_scored_snapshots(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _once(scored, "--probe", "ncm,ridge") == 0

    lines = r"^step \d, epoch \d on digits, 3 validation images per class: ncm, 1img [^;]*; ridge, 1img"
    assert len(re.findall(lines, capsys.readouterr().out, re.MULTILINE)) == 3
    assert len(list_results([scored / "eval"])) == 6


def test_features_of_the_validation_images_are_measured(watched: Path) -> None:
    snapshots, faults = read_snapshot_features(watched / "eval")

    assert ([snapshot.step for snapshot in snapshots], faults) == ([2, 4, 6], [])
    assert all(snapshot.images == 30 and not snapshot.problem for snapshot in snapshots)
    assert all((snapshot.feature_rank or 0) > 1 for snapshot in snapshots)


def test_scores_of_removed_snapshots_stay_on_the_page(scored: Path) -> None:
    shutil.rmtree(scored / "checkpoints" / "step-00000002")

    assert _once(scored) == 0

    assert _steps_on_page(scored) == ["6", "4", "2"]


def test_probes_of_the_run_itself_are_shown_at_the_end_of_their_epoch(unscored: Path) -> None:
    assert main(["--checkpoint", str(unscored), *_DATA, "--out", str(unscored / "eval"), "-q", "--json"]) == 0
    shutil.rmtree(unscored / "checkpoints" / "step-00000006")

    assert _once(unscored) == 0

    assert _steps_on_page(unscored) == ["6", "4", "2"]
    assert [snapshot.step for snapshot in read_snapshot_features(unscored / "eval")[0]] == [2, 4]


def test_steps_after_the_one_that_a_run_was_set_back_to_are_not_shown(scored: Path) -> None:
    shutil.rmtree(scored / "checkpoints" / "step-00000006")
    lines = (scored / "metrics.jsonl").read_text().splitlines(keepends=True)
    (scored / "metrics.jsonl").write_text("".join(lines[:4]))

    assert _once(scored) == 0

    assert _steps_on_page(scored) == ["4", "2"]


def test_scores_on_different_images_are_not_mixed(scored: Path) -> None:
    assert _once(scored, "--limit", "2") == 0

    assert len(list_results([scored / "eval"])) == 6
    assert _page(scored).count('<th scope="col">ncm') == 1


def test_the_plot_is_the_same_every_time(watched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run $x$"))

    plots = []
    for _ in range(2):
        assert _once(run) == 0
        plots.append((run / "eval" / "trajectory.png").read_bytes())

    assert plots[0].startswith(b"\x89PNG")
    assert plots[0] == plots[1]


@pytest.mark.parametrize(
    ("numbers", "count", "message"),
    [
        ({"me_max": 2.0}, 10, "collapse: all images are on one prototype, since step 7"),
        ({"loss": None}, 3, "loss or gradient is not finite, since step 7"),
    ],
)
def test_an_alarm_has_its_exit_code_and_message(
    numbers: dict[str, float | None], count: int, message: str, scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _add_lines(scored, count, **numbers)

    code = _once(scored)

    assert (code, message in capsys.readouterr().err) == (23, True)
    assert message in _page(scored)


def test_a_snapshot_with_equal_features_is_an_alarm(unscored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unscored / "checkpoints" / "step-00000006"
    encoder = folder / "encoder.safetensors"
    with safe_open(encoder, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(encoder) | {"patch_embed.proj.weight": torch.zeros(16, 3, 8, 8)}, encoder, metadata)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["encoder.safetensors"] = file_sha256(encoder)
    (folder / "manifest.json").write_text(json.dumps(add_seal(manifest)))

    code = _once(unscored)

    assert (code, "features of a snapshot: collapsed representation" in capsys.readouterr().err) == (23, True)


def test_damaged_lines_of_the_journal_are_reported_and_left_out(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (scored / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"1", b"2", 1)
    (scored / "metrics.jsonl").write_bytes(b"".join([*lines, b'{"step": 8, "lo']))

    assert _once(scored) == 0

    text = "metrics.jsonl: 1 damaged line left out (2)."
    assert text in capsys.readouterr().err
    assert text in _page(scored)


def test_lines_without_checksums_are_not_trusted_as_numbers(scored: Path) -> None:
    with (scored / "metrics.jsonl").open("wb") as file:
        file.write(b'\xff\n[]\n"step"\n{"step": "7"}\n{"step": 7, "loss": "<b>", "me_max": NaN}\n{"step": 8, "lo')

    assert _once(scored) == 0

    assert "step 7 of 6" in _page(scored)


def test_a_snapshot_without_manifest_is_not_scored_yet(unscored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (unscored / "checkpoints" / "step-00000006" / "manifest.json").unlink()

    assert _once(unscored) == 0

    assert _printed_steps(capsys.readouterr().out) == ["2", "4"]


def test_a_snapshot_that_is_removed_meanwhile_is_skipped(
    unscored: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    list_unscored = msn_eval.monitor.trajectory.list_unscored

    def list_and_remove(*arguments: Any) -> list[SnapshotFiles]:
        snapshots = list_unscored(*arguments)
        shutil.rmtree(unscored / "checkpoints" / "step-00000002", ignore_errors=True)
        return snapshots

    monkeypatch.setattr(msn_eval.monitor.trajectory, "list_unscored", list_and_remove)

    assert _once(unscored) == 0

    output = capsys.readouterr()
    assert _printed_steps(output.out) == ["4", "6"]
    assert "step-00000002 was removed while it was read" in output.err


def test_a_damaged_snapshot_is_an_error_and_the_others_are_scored(
    unscored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unscored / "checkpoints" / "step-00000004" / "encoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)

    code = _once(unscored)

    output = capsys.readouterr()
    assert (code, _printed_steps(output.out)) == (20, ["2", "6"])
    assert "step-00000004/encoder.safetensors: is not the file that its manifest describes" in output.err


def test_damaged_records_and_statistics_are_named_and_counted_on_the_page(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(scored / "checkpoints" / "step-00000004")
    (record,) = [result for result in list_results([scored / "eval"]) if result.checkpoint.name.endswith(" 4")]
    for path in (next((scored / "eval").glob("step-00000004.*")), scored / "eval" / f"{record.id}.json"):
        path.write_text("{")

    code = _once(scored)

    shown = capsys.readouterr().err
    assert (code, f"{record.id}.json" in shown, "step-00000004." in shown) == (22, True, True)
    assert "Left out: 2 files that cannot be read" in _page(scored)


def test_a_damaged_record_of_an_existing_snapshot_is_measured_again(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next((scored / "eval").glob("????????????????.json"))
    metrics = read_result(path).metrics
    path.write_text("{")

    code = _once(scored)

    assert (code, "not a readable result" in capsys.readouterr().err) == (0, True)
    assert read_result(path).metrics == metrics


@pytest.mark.parametrize(
    ("change", "options", "code", "message"),
    [
        (shutil.rmtree, (), 20, "no such folder"),
        (lambda run: [shutil.rmtree(run), run.mkdir()], (), 20, "is not a run folder of msn-pretrain"),
        (lambda run: (run / "config.yaml").write_text("- 1\n"), (), 20, "cannot be read as the configuration of a run"),
        (lambda run: None, ("--data", "nothing"), 21, "nothing"),
        (lambda run: [*map(shutil.rmtree, snapshot_folders(run))], (), 20, "has no finished snapshot yet"),
        (lambda run: None, ("--every", "0"), 2, "--every "),
        (lambda run: None, ("--every", "nan"), 2, "--every "),
        (lambda run: None, ("--patience", "-1"), 2, "--patience "),
    ],
)
def test_a_run_or_an_option_that_cannot_be_used_is_refused(
    change: Callable[[Path], object],
    options: tuple[str, ...],
    code: int,
    message: str,
    unscored: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(unscored)

    assert _once(unscored, *options) == code

    assert message in capsys.readouterr().err


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Return a list of actions; each wait of `watch` removes and calls the first one."""
    actions: list[Callable[[], object]] = []
    sleep = command.time.sleep
    monkeypatch.setattr(command.time, "sleep", lambda seconds: actions.pop(0)() if actions else sleep(seconds))
    return actions


def test_following_scores_new_snapshots_and_ends_with_the_run(
    unscored: Path, tmp_path: Path, waits: list[Callable[[], object]], capsys: pytest.CaptureFixture[str]
) -> None:
    last = unscored / "checkpoints" / "step-00000006"
    hidden = last.rename(tmp_path / "hidden")
    waits += [lambda: None, lambda: hidden.rename(last)]

    assert _follow(unscored) == 0

    assert (waits, _printed_steps(capsys.readouterr().out)) == ([], ["2", "4", "6"])


def test_following_ends_when_nothing_is_written_any_more(unscored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in snapshot_folders(unscored):
        shutil.rmtree(folder)

    code = _follow(unscored, "--patience", "0.0005")

    assert (code, "nothing new was written for 0.0005 minutes" in capsys.readouterr().err) == (20, True)


def test_a_damaged_snapshot_is_tried_once_while_a_run_is_followed(
    scored: Path, waits: list[Callable[[], object]], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 6):
        next((scored / "eval").glob(f"step-0000000{step}.*")).unlink()
    shutil.rmtree(scored / "checkpoints" / "step-00000006")
    (scored / "checkpoints" / "step-00000004" / "encoder.safetensors").write_bytes(b"\0" * 64)
    waits += [lambda: _add_lines(scored, 1)] * 2

    code = _follow(scored, "--patience", "0.002")

    assert (code, waits) == (20, [])
    assert capsys.readouterr().err.count("step-00000004") == 2  # when it was tried, and at the end


def _damage_encoder(snapshot: Path) -> None:
    (snapshot / "encoder.safetensors").write_bytes(b"\0" * 64)


def _damage_manifest(snapshot: Path) -> None:
    (snapshot / "manifest.json").write_text("{")


@pytest.mark.parametrize("damage", [_damage_encoder, _damage_manifest])
def test_following_a_run_whose_last_snapshot_is_damaged_ends(
    damage: Callable[[Path], None], scored: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    next((scored / "eval").glob("step-00000006.*")).unlink()
    damage(scored / "checkpoints" / "step-00000006")
    monkeypatch.setattr(command.time, "sleep", lambda seconds: pytest.fail("it waits for a run that has ended"))

    code = _follow(scored)

    assert (code, "step-00000006" in capsys.readouterr().err) == (20, True)


def test_an_alarm_is_printed_once_while_a_run_is_followed(
    scored: Path, waits: list[Callable[[], object]], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(scored / "checkpoints" / "step-00000006")
    next((scored / "eval").glob("step-00000006.*")).unlink()
    _add_lines(scored, 10, me_max=2.0, cross_entropy=1.0)
    waits += [lambda: _add_lines(scored, 1, me_max=2.0, cross_entropy=1.0)]

    code = _follow(scored, "--patience", "0.001")

    assert (code, capsys.readouterr().err.count("ALARM")) == (23, 1)
