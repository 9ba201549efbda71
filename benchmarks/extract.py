"""Feature extraction against transformers' ViTMSN with SDPA: images a second as ratios in one run.

    python benchmarks/extract.py [--device cuda] [--rounds 7]

ViT-S/16 at 224 pixels with the same random weights in both, uint8 pixels in, features out; the two take turns, so that
a machine whose speed drifts drifts for both. Prints the median of the rounds' ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from msn_eval.checkpoint import read_checkpoint
from msn_eval.encoder import Encoder, Precision, build_encoder, encode

_BATCH = {"cpu": 16, "cuda": 256}


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    pixels = torch.randint(0, 256, (_BATCH[device.type], 224, 224, 3), dtype=torch.uint8)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}, batch {len(pixels)}, ViT-S/16 at 224"
    )
    theirs = {precision: _transformers(device, precision) for precision in _PRECISIONS}
    ours = {precision: _ours(device, precision) for precision in _PRECISIONS}
    for precision in _PRECISIONS:
        _compare(f"{precision} against ViTMSN {precision}", ours[precision], theirs[precision], pixels, options.rounds)
    _compare("bf16 against ViTMSN fp32", ours["bf16"], theirs["fp32"], pixels, options.rounds)


_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def _ours(device: torch.device, precision: Precision) -> Callable[[Tensor], Tensor]:
    checkpoint = read_checkpoint("random:vit_small_patch16_224")
    encoder: Encoder = build_encoder(checkpoint, device=device, precision=precision)
    return lambda pixels: encode(encoder, pixels, ["cls"])["cls"]


def _transformers(device: torch.device, precision: Precision) -> Callable[[Tensor], Tensor]:
    from transformers import ViTMSNConfig, ViTMSNModel

    config = ViTMSNConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-6, attn_implementation="sdpa"
    )
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = ViTMSNModel(config).eval().to(device=device, dtype=dtype)
    mean = torch.tensor([0.5, 0.5, 0.5], device=device)

    def features(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            images = ((pixels.to(device).float() / 255 - mean) / mean).permute(0, 3, 1, 2).contiguous().to(dtype)
            states: Tensor = model(pixel_values=images).last_hidden_state
            return states[:, 0].float()

    return features


def _compare(
    title: str, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], pixels: Tensor, rounds: int
) -> None:
    for one in (ours, theirs):
        one(pixels)
    pairs = [(_rate(ours, pixels), _rate(theirs, pixels)) for _ in range(rounds)]
    ratios = sorted(our / their for our, their in pairs)
    our, their = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"{title}: {our:.1f} against {their:.1f} images/s, ratio {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def _rate(features: Callable[[Tensor], Tensor], pixels: Tensor) -> float:
    started = time.perf_counter()
    features(pixels).sum().item()
    return len(pixels) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
