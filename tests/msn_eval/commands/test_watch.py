"""`msn-eval watch` on a small real run, made once."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import msn_eval.monitor.snapshot_features
import msn_eval.monitor.trajectory
from msn_eval.checkpoints.run_folder import SnapshotFiles, file_sha256, snapshot_folders
from msn_eval.cli import main
from msn_eval.commands import watch as command
from msn_eval.monitor.snapshot_features import read_snapshot_features
from msn_eval.reports.html import trajectory as trajectory_report
from msn_eval.results.folder import list_results
from msn_pretrain.config.load import read_recipe
from msn_pretrain.distributed.process_group import Ranks
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
Watch = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a run of 6 steps on 40 digits, with a snapshot after every other one."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(_RECIPE)
    recipe = read_recipe(folder / "recipe.yaml", overrides=[f"run.dir={folder / 'tiny run'}"])
    assert train(recipe, Ranks(rank=0, world=1, device=torch.device("cpu")), quiet=True) == 0
    return folder / "tiny run"


@pytest.fixture(autouse=True)
def without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots, which take a second each, but in the test of them."""
    if "plot" not in request.node.name:
        monkeypatch.setattr(trajectory_report, "render_plot", lambda sheet: b"")


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """Give a copy of the run that nothing was measured of."""
    return Path(shutil.copytree(trained, tmp_path / "tiny run"))


@pytest.fixture(scope="module")
def watched(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a copy of the run that was watched once."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("watched") / "tiny run"))
    assert _once(run) == 0
    return run


def _once(run: Path, *options: str) -> int:
    given = ["--once", "--device", "cpu", "--workers", "0", "--limit", "3", "--probe", "ncm", *options]
    return main(["watch", str(run), *given])


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("trajectory.")}


def _add_lines(run: Path, count: int, **facts: Any) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    lines += [json.dumps({**last, **facts, "step": last["step"] + number}) for number in range(1, count + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_every_snapshot_is_scored_in_ordinary_records(watched: Path) -> None:
    results = list_results([watched / "eval"])

    assert sorted(one.checkpoint.name for one in results) == [f"tiny run step {step}" for step in (2, 4, 6)]
    assert {(one.probe.name, one.split.subset, one.split.draw) for one in results} == {("ncm", "1img", 1)}
    assert [
        path.name for path in (watched / "eval").iterdir() if path.name.startswith(".")
    ] == []  # no features are kept
    assert main(["verify", str(watched / "eval")]) == 0


def test_a_record_is_the_one_that_evaluating_the_file_gives(watched: Path, tmp_path: Path) -> None:
    encoder = watched / "checkpoints" / "step-00000004" / "encoder.safetensors"
    arguments = ["--data", "digits", "--subset", "1img@1", "--probe", "ncm", "--limit", "3", "--device", "cpu"]
    assert main(["--checkpoint", str(encoder), *arguments, "--out", str(tmp_path), "--no-cache", "-q", "--json"]) == 0

    (other,) = list_results([tmp_path])
    (known,) = [one for one in list_results([watched / "eval"]) if one.checkpoint.name.endswith(" 4")]
    assert (known.id, known.metrics) == (other.id, other.metrics)


def test_a_second_look_computes_and_rewrites_nothing(
    watched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _content(watched / "eval")
    monkeypatch.setattr(msn_eval.monitor.trajectory, "prepare", lambda *_: pytest.fail("a checkpoint was read again"))

    assert _once(watched) == 0

    assert _content(watched / "eval") == before
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["trajectory.html", "trajectory.png"]


def test_another_probe_is_measured_of_snapshots_that_were_looked_at_before(
    watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))

    assert _once(run, "--probe", "ncm,ridge") == 0

    assert len(re.findall(r"^step \d.*ncm.*ridge", capsys.readouterr().out, re.MULTILINE)) == 3
    assert len(list_results([run / "eval"])) == 6


def test_looks_tell_rank_and_spread_of_the_validation_images(watched: Path) -> None:
    looks, faults = read_snapshot_features(watched / "eval")

    assert ([one.step for one in looks], faults) == ([2, 4, 6], [])
    assert all(one.images == 30 and (one.feature_rank or 0) > 1 and not one.problem for one in looks)


def test_scores_of_snapshots_that_were_removed_since_stay_on_the_page(watched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000002")

    assert _once(run) == 0

    assert _steps_shown(run) == ["6", "4", "2"]


def _steps_shown(run: Path) -> list[str]:
    return re.findall(r'<tr><th scope="row">(\d+)</th>', (run / "eval" / "trajectory.html").read_text())


def test_what_the_run_itself_has_probed_is_shown_at_the_end_of_its_epoch(copied: Path) -> None:
    given = ["--data", "digits", "--subset", "1img@1", "--probe", "ncm", "--limit", "3", "--device", "cpu", "-q"]
    assert main(["--checkpoint", str(copied), *given, "--out", str(copied / "eval"), "--json"]) == 0
    shutil.rmtree(copied / "checkpoints" / "step-00000006")

    assert _once(copied) == 0

    assert _steps_shown(copied) == ["6", "4", "2"]
    assert [one.step for one in read_snapshot_features(copied / "eval")[0]] == [2, 4]


def test_steps_that_a_run_has_gone_back_behind_are_not_shown(watched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:4]))

    assert _once(run) == 0

    assert _steps_shown(run) == ["4", "2"]


def test_scores_on_other_images_are_not_mixed_in(watched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))

    assert _once(run, "--limit", "2") == 0

    assert len(list_results([run / "eval"])) == 6
    assert (run / "eval" / "trajectory.html").read_text().count('<th scope="col">ncm') == 1


def test_page_asks_for_nothing_and_shows_names_as_text(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "<script>alert(1)<"))

    assert _once(run) == 0

    page = (run / "eval" / "trajectory.html").read_text()
    assert page.count("<script") == 2
    assert "default-src 'none'" in page
    assert re.findall(r'(?:src|href)="([^,"]*)', page) == ["data:"]


def test_plot_is_drawn_the_same_every_time(watched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run $x$"))

    plots = []
    for _ in range(2):
        assert _once(run) == 0
        plots.append((run / "eval" / "trajectory.png").read_bytes())

    assert plots[0].startswith(b"\x89PNG")
    assert plots[0] == plots[1]


@pytest.mark.parametrize(
    ("facts", "count", "what"),
    [
        ({"me_max": 2.0}, 10, "collapse: all images are on one prototype, since step 7"),
        (
            {"target_entropy": 2.07},
            10,
            "collapse: targets prefer no prototype (entropy near log k = 2.08), since step 7",
        ),
        ({"cross_entropy": 2.08, "epoch": 2}, 10, "nothing is learnt: cross-entropy at log k = 2.08"),
        ({"feature_spread": 0.001}, 10, "collapse: all images look alike (spread below 0.01 or rank below 1.05)"),
        ({"loss": None}, 3, "loss or gradient is not finite, since step 7"),
    ],
)
def test_an_alarm_ends_with_its_own_code_and_words(
    facts: dict[str, float | None],
    count: int,
    what: str,
    watched: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    _add_lines(run, count, **facts)

    code = _once(run)

    assert (code, what in capsys.readouterr().err) == (23, True)
    assert what in (run / "eval" / "trajectory.html").read_text()


def test_a_snapshot_whose_features_are_all_alike_raises_the_alarm(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    folder = copied / "checkpoints" / "step-00000006"
    encoder = folder / "encoder.safetensors"
    with safe_open(encoder, "pt") as file:
        facts = file.metadata()
    blind = {
        name: value * 0 if name == "patch_embed.proj.weight" else value for name, value in load_file(encoder).items()
    }
    save_file(blind, encoder, facts)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["encoder.safetensors"] = file_sha256(encoder)
    (folder / "manifest.json").write_text(json.dumps(manifest))

    code = _once(copied)

    assert (code, "a snapshot's features: collapsed representation" in capsys.readouterr().err) == (23, True)


def test_a_torn_last_line_and_lines_that_are_none_are_passed_over(
    watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\n[]\n"step"\n{"step": "7"}\n{"step": 7, "loss": "<b>", "me_max": NaN}\n{"step": 8, "lo')

    assert _once(run) == 0

    assert "step 7 of 6" in (run / "eval" / "trajectory.html").read_text()


def test_a_snapshot_without_manifest_is_being_written_and_waited_for(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "checkpoints" / "step-00000006" / "manifest.json").unlink()

    assert _once(copied) == 0

    assert re.findall(r"^step (\d)", capsys.readouterr().out, re.MULTILINE) == ["2", "4"]


def test_a_snapshot_removed_while_it_is_read_is_passed_over(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = msn_eval.monitor.trajectory.unscored

    def removed_since(*arguments: Any) -> list[SnapshotFiles]:
        found = listed(*arguments)
        if found:
            shutil.rmtree(copied / "checkpoints" / "step-00000002")
        return found

    monkeypatch.setattr(msn_eval.monitor.trajectory, "unscored", removed_since)

    assert _once(copied) == 0

    seen = capsys.readouterr()
    assert re.findall(r"^step (\d)", seen.out, re.MULTILINE) == ["4", "6"]
    assert "step-00000002 was removed while it was read" in seen.err


def test_a_damaged_snapshot_is_told_and_hides_no_other(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "checkpoints" / "step-00000004" / "encoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)

    code = _once(copied)

    seen = capsys.readouterr()
    assert re.findall(r"^step (\d)", seen.out, re.MULTILINE) == ["2", "6"]
    assert (code, "step-00000004/encoder.safetensors: is not the file that its manifest describes" in seen.err) == (
        20,
        True,
    )


def test_damaged_records_and_looks_are_told_on_the_page(watched: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (old,) = [one for one in list_results([run / "eval"]) if one.checkpoint.name.endswith(" 4")]
    for path in (next((run / "eval").glob("step-00000004.*")), run / "eval" / f"{old.id}.json"):
        path.write_text("{")

    assert _once(run) == 0

    assert "Left out, because they cannot be read: 2 files" in (run / "eval" / "trajectory.html").read_text()


def test_a_damaged_record_of_a_snapshot_that_is_there_is_refused(
    watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    next((run / "eval").glob("????????????????.json")).write_text("{")

    assert (_once(run), "not a readable result" in capsys.readouterr().err) == (22, True)


@pytest.mark.parametrize(
    ("make", "code", "what"),
    [
        (lambda run: shutil.rmtree(run), 20, "no such folder"),
        (lambda run: [shutil.rmtree(run), run.mkdir()], 20, "is no folder that msn-pretrain trains in"),
        (lambda run: (run / "config.yaml").write_text("- 1\n"), 20, "is no configuration of a run"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), 20, "config.yaml: cannot be read"),
        (
            lambda run: shutil.rmtree(run / "checkpoints" / "x", ignore_errors=True),
            21,
            "the data folder does not exist",
        ),
        (lambda run: [shutil.rmtree(one) for one in snapshot_folders(run)], 20, "holds no finished snapshot yet"),
    ],
    ids=["missing", "empty", "no configuration", "torn configuration", "no data", "no snapshot"],
)
def test_what_cannot_be_watched_is_refused(
    make: Callable[[Path], object], code: int, what: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(copied)
    data = ["--data", str(copied / "nothing")] if code == 21 else []

    found = _once(copied, *data)

    assert (found, what in capsys.readouterr().err) == (code, True)


@pytest.mark.parametrize("option", [("--every", "0"), ("--patience", "-1"), ("--every", "nan")])
def test_waiting_no_time_is_refused(option: tuple[str, str], copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _once(copied, *option) == 2
    assert f"{option[0]} " in capsys.readouterr().err


def _follow(run: Path, *options: str) -> int:
    given = ["--device", "cpu", "--workers", "0", "--limit", "3", "--probe", "ncm", "--every", "0.01", *options]
    return main(["watch", str(run), *given])


def test_following_scores_what_comes_and_ends_with_the_run(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last, aside = copied / "checkpoints" / "step-00000006", tmp_path / "aside"
    last.rename(aside)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            aside.rename(last)

    monkeypatch.setattr(command.time, "sleep", wait)

    assert _follow(copied) == 0

    assert (waits, re.findall(r"^step (\d)", capsys.readouterr().out, re.MULTILINE)) == ([0.01, 0.01], ["2", "4", "6"])


def test_following_ends_where_nothing_is_written_any_more(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in snapshot_folders(copied):
        shutil.rmtree(folder)

    code = _follow(copied, "--patience", "0.0005")

    seen = capsys.readouterr().err
    assert (code, "nothing new was written for 0.0005 minutes" in seen) == (20, True)


def test_a_damaged_snapshot_is_tried_once_while_the_run_is_followed(
    watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    for path in (run / "eval").glob("step-00000006.*"):
        path.unlink()
    (run / "checkpoints" / "step-00000006" / "encoder.safetensors").write_bytes(b"\0" * 64)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) < 3:
            _add_lines(run, 1)

    monkeypatch.setattr(command.time, "sleep", wait)

    code = _follow(run, "--patience", "0.002")

    assert (code, len(waits) > 2) == (20, True)
    assert capsys.readouterr().err.count("step-00000006") == 2  # when it was tried, and at the end


def test_an_alarm_is_told_once_while_the_run_is_followed(
    watched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(watched, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    for path in (run / "eval").glob("step-00000006.*"):
        path.unlink()
    _add_lines(run, 10, me_max=2.0, cross_entropy=1.0)

    code = _follow(run, "--patience", "0.001")

    assert (code, capsys.readouterr().err.count("ALARM")) == (23, 1)


def test_a_run_that_goes_through_a_step_again_shows_the_newer_snapshot(watched: Path) -> None:
    looks, _ = read_snapshot_features(watched / "eval")
    old = looks[1]
    new = replace(old, created="2999-01-01T00:00:00Z", weights_sha256="0" * 64)

    assert msn_eval.monitor.snapshot_features.newest_of_each_step([new, old], old.seen) == {4: new}
