"""Compare the encoder with transformers' ViTMSN with SDPA and timm's forward pass: images per second, as ratios within one run.

    python benchmarks/extract.py [--device cuda] [--arch vit_small_patch16_224,vit_base_patch16_224] [--rounds 7]

Images of 224 pixels, random weights; from uint8 pixels to features. The implementations alternate, so that changes of
the machine's speed affect all of them. Prints the median of the rounds' ratios, our speed as a fraction of the measured
speed of large matrix products, and the time that the 71,635 images of the ImageNet low-shot protocol would take.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from msn_eval.checkpoints.checkpoint import Checkpoint, read_checkpoint
from msn_eval.features.encoder import Encoder, Precision, build_encoder, encode, exact_float32

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BATCH = {"cpu": 16, "cuda": 256}


def main() -> None:
    """Print one line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arch", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    pixels = torch.randint(0, 256, (_BATCH[device.type], 224, 224, 3), dtype=torch.uint8)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}, batch {len(pixels)}")
    peaks = {precision: _products_a_second(device, precision) for precision in _PRECISIONS}
    print(", ".join(f"{precision} products: {peak / 1e12:.2f} TFLOP/s" for precision, peak in peaks.items()))
    for arch in options.arch.split(","):
        checkpoint = read_checkpoint(f"random:{arch}")
        ours = {precision: _ours(checkpoint, device, precision) for precision in _PRECISIONS}
        others = {
            f"{name} {precision}": make(checkpoint, device, precision)
            for precision in _PRECISIONS
            for name, make in (("ViTMSN", _transformers), ("timm", _timm))
        }
        for precision in _PRECISIONS:
            for name in (f"ViTMSN {precision}", f"timm {precision}"):
                _compare(f"{arch} {precision} against {name}", ours[precision], others[name], pixels, options.rounds)
        _compare(f"{arch} bf16 against ViTMSN fp32", ours["bf16"], others["ViTMSN fp32"], pixels, options.rounds)
        for precision in _PRECISIONS:
            rate = statistics.median(_rate(ours[precision], pixels) for _ in range(options.rounds))
            share = rate * _products(checkpoint.network) / peaks[precision]
            minutes = _PROTOCOL_IMAGES / rate / 60
            print(f"{arch} {precision}: {share:.0%} of the speed of products; 71,635 images in {minutes:.1f} min")


_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
_PROTOCOL_IMAGES = 71_635
_SIDE = 4096  # of the square matrices that measure a device


def _products_a_second(device: torch.device, precision: Precision) -> float:
    """Measure the floating-point operations per second of large matrix products. fp32 products use no TF32."""
    side = _SIDE if device.type == "cuda" else _SIDE // 2
    matrix = torch.randn(side, side, device=device, dtype=_DTYPES[precision])
    with exact_float32():
        best = 0.0
        for _ in range(8):
            started = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def _products(network: torch.nn.Module) -> float:
    """Return the floating-point operations of a ViT's matrix products for one image, for all tokens of all blocks."""
    tokens, width = cast(Tensor, network.pos_embed).shape[1:]
    depth = len(cast(torch.nn.Sequential, network.blocks))
    embedding = (tokens - 1) * cast(torch.nn.Conv2d, network.patch_embed.proj).weight.numel()  # type: ignore[union-attr]
    return float(2 * embedding + depth * (24 * tokens * width**2 + 4 * tokens**2 * width))


def _ours(checkpoint: Checkpoint, device: torch.device, precision: Precision) -> Callable[[Tensor], Tensor]:
    encoder: Encoder = build_encoder(checkpoint, device=device, precision=precision)
    return lambda pixels: encode(encoder, pixels, ["cls"])["cls"]


def _timm(checkpoint: Checkpoint, device: torch.device, precision: Precision) -> Callable[[Tensor], Tensor]:
    network = copy.deepcopy(checkpoint.network).to(device=device, dtype=_DTYPES[precision])
    mean = torch.tensor(checkpoint.mean, device=device)
    std = torch.tensor(checkpoint.std, device=device)

    def features(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            images = ((pixels.to(device).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
            tokens: Tensor = network.forward_features(images.to(_DTYPES[precision]))  # type: ignore[operator]
            return tokens[:, 0].float()

    return features


def _transformers(checkpoint: Checkpoint, device: torch.device, precision: Precision) -> Callable[[Tensor], Tensor]:
    from transformers import ViTMSNConfig, ViTMSNModel

    network = checkpoint.network
    config = ViTMSNConfig(
        hidden_size=network.embed_dim,
        num_hidden_layers=len(network.blocks),  # type: ignore[arg-type]
        num_attention_heads=network.blocks[0].attn.num_heads,  # type: ignore[index, union-attr]
        intermediate_size=4 * network.embed_dim,  # type: ignore[operator]
        layer_norm_eps=1e-6,
        attn_implementation="sdpa",
    )
    dtype = _DTYPES[precision]
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
