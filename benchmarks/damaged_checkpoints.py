"""Show what the regression gate says of a checkpoint that was damaged on purpose, and of one that was changed harmlessly.

    python benchmarks/damaged_checkpoints.py --run RUN --data cifar10 --work runs/damaged --out gate.md

The baseline is the run's own network by logistic regression on 5 and 10 images per class (three draws each) and on 10 %.
Each variant is a file or network that a real mistake produces:

- block zeroed: the projections of one block are zeros, as after a partial load;
- EMA skipped: the anchor encoder is exported instead of the moving average;
- norm twice: code that applies the final norm to features that are normalised already;
- bf16: the same weights, rounded to bfloat16.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_VERDICTS = {0: "pass", 10: "regression", 11: "inconclusive", 12: "not comparable"}
_PROTOCOL = ("--subset", "5imgs,10imgs,10pct@1", "--probe", "logistic", "--precision", "fp32")
_FACTORY = '''"""A network whose features pass the final norm twice."""

from torch import Tensor, nn

from msn_eval import load_encoder


class NormedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = load_encoder("msn.safetensors").network
        self.image_pixels = 32

    def forward(self, images: Tensor) -> Tensor:
        return self.network.norm(self.network.forward_features(images))[:, 0]
'''


def write_variants(run: Path, work: Path) -> dict[str, list[str]]:
    """Write the checkpoints, and return the options that name each of them."""
    _call("msn_pretrain", "export", str(run), "--to", "timm", "--out", "msn.safetensors", work=work)
    with safe_open(work / "msn.safetensors", framework="pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    block = {
        name: torch.zeros_like(weight) if name.startswith("blocks.1.") and ".norm" not in name else weight
        for name, weight in weights.items()
    }
    save_file(block, work / "block_zeroed.safetensors", metadata)
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, work / "bf16.safetensors", metadata)
    snapshot = max((run / "checkpoints").iterdir())
    state = torch.load(snapshot / "state.pt", map_location="cpu", weights_only=True)["model"]
    prefix = "anchor.trunk.network."
    anchor = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    save_file(anchor, work / "ema_skipped.safetensors", metadata)
    (work / "normed_twice.py").write_text(_FACTORY)
    return {
        "the same file": ["msn.safetensors"],
        "rounded to bf16": ["bf16.safetensors"],
        "one block zeroed": ["block_zeroed.safetensors"],
        "EMA skipped": ["ema_skipped.safetensors"],
        "norm applied twice": ["py:normed_twice:NormedTwice"],
    }


def write_page(variants: dict[str, list[str]], data: Path, work: Path) -> str:
    """Return the page: the verdict of the gate on each variant."""
    _call("msn_eval", "--checkpoint", "msn.safetensors", "--data", str(data), *_PROTOCOL, "--out", "runs", work=work)
    _call("msn_eval", "baseline", "runs", "--out", "baseline.json", work=work)
    rows, details = [], []
    for name, options in variants.items():
        arguments = ["--baseline", "baseline.json", "--checkpoint", *options, "--data", str(data)]
        output = ["--out", f"runs-{name.replace(' ', '-')}", "--markdown", "verdict.md"]
        code = _call("msn_eval", "check", *arguments, *output, work=work, codes=tuple(_VERDICTS)).returncode
        rows.append(f"| {name} | {_VERDICTS[code]} | {code} |")
        details += ["", f"## {name[0].upper()}{name[1:]}", "", (work / "verdict.md").read_text().strip()]
    head = [
        "# The gate on damaged checkpoints",
        "",
        "Written by `benchmarks/damaged_checkpoints.py`, which describes the variants. `msn-eval check` compares each with the",
        "baseline, image by image. Every exit code but 0 stops a build.",
        "",
        "| variant | verdict | exit code |",
        "| --- | --- | ---: |",
    ]
    return "\n".join([*head, *rows, *details]) + "\n"


def _call(
    module: str, *arguments: str, work: Path, codes: tuple[int, ...] = (0,)
) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done


def main() -> None:
    """Write variants and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of msn-pretrain")
    parser.add_argument("--data", type=Path, required=True, help="the images that it was trained on")
    parser.add_argument("--work", type=Path, required=True, help="folder of what is made on the way")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    variants = write_variants(options.run.resolve(), options.work)
    options.out.write_text(write_page(variants, options.data.resolve(), options.work), encoding="utf-8")


if __name__ == "__main__":
    main()
