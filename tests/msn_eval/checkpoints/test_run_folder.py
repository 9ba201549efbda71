import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msn_eval.checkpoints.checkpoint import read_checkpoint, weights_sha256
from msn_eval.checkpoints.run_folder import format_metrics, newest_snapshot, read_metrics
from msn_eval.cli import main
from msn_eval.errors import CheckpointError
from msn_eval.files.json_records import add_seal

_ARCH = "vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=32&depth=1&num_heads=2"


def _snapshot(run: Path, step: int, *, seed: int) -> Path:
    """Write a snapshot as msn-pretrain does, of an encoder whose number of heads no weight shows."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (run / "config.yaml").touch()
    network = read_checkpoint(f"random:{_ARCH}", seed=seed).network
    facts = {"msn_eval.architecture": _ARCH, "epoch": str(step // 10)}
    save_file(network.state_dict(), folder / "encoder.safetensors", metadata=facts)
    (folder / "state.pt").write_bytes(b"whatever training needs")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    manifest = {"schema": 1, "step": step, "epoch": step // 10, "world": 1, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _weights(seed: int) -> str:
    return weights_sha256(read_checkpoint(f"random:{_ARCH}", seed=seed).network.state_dict())


def test_a_run_is_read_by_its_newest_snapshot_without_its_architecture_being_named(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    for step, seed in ((20, 1), (100, 2)):
        _snapshot(run, step, seed=seed)

    checkpoint = read_checkpoint(str(run))

    assert checkpoint.weights_sha256 == _weights(2)
    assert (checkpoint.name, checkpoint.arch, checkpoint.epoch) == ("mine", _ARCH, 10)


def test_incomplete_snapshots_are_skipped(tmp_path: Path) -> None:
    for step, seed in ((20, 1), (30, 2), (40, 3)):
        folder = _snapshot(tmp_path, step, seed=seed)
    (folder / "state.pt").write_bytes(b"torn")
    (tmp_path / "checkpoints" / "step-00000030" / "manifest.json").unlink()

    found, skipped = newest_snapshot(tmp_path)

    assert found is not None
    assert found.step == 20
    assert [reason.partition(":")[0] for reason in skipped] == ["step-00000040", "step-00000030"]
    assert read_checkpoint(str(tmp_path)).weights_sha256 == _weights(1)


def test_run_without_a_complete_snapshot_is_refused_with_the_reason(tmp_path: Path) -> None:
    (_snapshot(tmp_path, 20, seed=1) / "manifest.json").unlink()

    with pytest.raises(CheckpointError, match="never finished"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "manifest", ["[]", '{"schema": 2}', '{"schema": 1, "step": 20, "epoch": 2, "world": 1, "files": {}}']
)
def test_unknown_manifest_is_skipped(tmp_path: Path, manifest: str) -> None:
    (_snapshot(tmp_path, 20, seed=1) / "manifest.json").write_text(manifest)

    assert newest_snapshot(tmp_path)[0] is None


@pytest.mark.parametrize(("field", "value"), [("step", 200), ("epoch", 3), ("world", 2), ("seal", "0" * 64)])
def test_changed_field_of_a_sealed_manifest_is_skipped_with_the_reason(
    tmp_path: Path, field: str, value: object
) -> None:
    path = _snapshot(tmp_path, 20, seed=1) / "manifest.json"
    sealed = add_seal(json.loads(path.read_text()))
    path.write_text(json.dumps(sealed))
    whole, _ = newest_snapshot(tmp_path)
    path.write_text(json.dumps(sealed | {field: value}))

    found, skipped = newest_snapshot(tmp_path)

    assert whole is not None
    assert (found, skipped) == (None, ("step-00000020: its seal does not match: it was edited or damaged",))


def test_manifest_that_names_files_elsewhere_is_skipped(tmp_path: Path) -> None:
    folder = _snapshot(tmp_path, 20, seed=1)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"]["../../config.yaml"] = hashlib.sha256(b"").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content))

    assert newest_snapshot(tmp_path)[0] is None


def test_an_untrained_network_can_have_a_runs_architecture(tmp_path: Path) -> None:
    _snapshot(tmp_path, 20, seed=1)

    checkpoint = read_checkpoint(f"random:{tmp_path}", seed=5)

    assert checkpoint.weights_sha256 == _weights(5)


def test_a_stated_architecture_cannot_reach_beyond_its_keywords(tmp_path: Path) -> None:
    weights = {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "blocks.0.attn.qkv.weight": torch.zeros(24, 8)}
    facts = {"msn_eval.architecture": "vit_tiny_patch16_224?checkpoint_path=/etc/passwd"}
    save_file(weights, tmp_path / "x.safetensors", metadata=facts)

    with pytest.raises(CheckpointError, match="checkpoint_path"):
        read_checkpoint(str(tmp_path / "x.safetensors"))


def test_inspect_shows_what_of_a_run_would_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _snapshot(tmp_path, 20, seed=1)

    assert main(["inspect", str(tmp_path)]) == 0

    output = capsys.readouterr().out
    assert "step-00000020/encoder.safetensors" in output
    assert _ARCH in output


# The journal.

_LINES = [{"step": step, "loss": 3.25, "epoch": step // 4, "rank": None} for step in range(1, 9)]


def test_every_flipped_bit_of_a_journal_is_found(tmp_path: Path) -> None:
    content = b"".join(map(format_metrics, _LINES))
    path = tmp_path / "metrics.jsonl"
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)

        lines, damaged = read_metrics(path)

        assert damaged or lines == _LINES, (bit, bytes(flipped))  # a lost end of the last line changes nothing
        assert all(line in _LINES for line in lines)


def test_a_line_whose_checksum_is_gone_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(format_metrics(_LINES[0]) + json.dumps(_LINES[1]).encode() + b"\n" + format_metrics(_LINES[2]))

    assert read_metrics(path) == ([_LINES[0], _LINES[2]], [2])


def test_a_journal_without_checksums_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in _LINES))

    assert read_metrics(path) == (_LINES, [])


def test_the_line_that_is_being_written_is_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(format_metrics(_LINES[0]) + format_metrics(_LINES[1])[:20])

    assert read_metrics(path) == (_LINES[:1], [])
