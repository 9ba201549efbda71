"""Structure: what a network computes with its weights, however its architecture is spelled."""

import hashlib
from collections.abc import Iterator

from torch import nn

# Attributes of timm's modules that change no feature: how weights are drawn, what happens in training, the classifier and
# its pooling (the taps are our own), and what the shape of the position embeddings decides.
_IGNORED = {
    *("training", "num_classes", "global_pool", "grad_checkpointing", "fused_attn", "drop_prob", "scale_by_keep", "p"),
    *("init_values", "fix_init", "weight_init_mode", "inplace", "no_embed_class"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
}


def structure_sha256(network: nn.Module) -> str:
    """Return the SHA-256 over all modules of a network: their names, types, and settings such as heads and epsilon."""
    return hashlib.sha256("\n".join(_describe_modules(network)).encode()).hexdigest()


def _describe_modules(network: nn.Module) -> Iterator[str]:
    for name, module in network.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in _IGNORED and _is_plain(value)
        }
        yield f"{name}\t{type(module).__name__}\t{sorted(settings.items())}"


def _is_plain(value: object) -> bool:
    """Whether a value is a number, a text, or a tuple of them."""
    return isinstance(value, int | float | str) or (isinstance(value, tuple) and all(map(_is_plain, value)))
