"""Live network: an encoder on a network that is being trained, which finds it afterwards as it was before."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from msn_eval.checkpoints.checkpoint import describe_own_network
from msn_eval.data.images import make_eval_transform
from msn_eval.errors import UsageError
from msn_eval.features.encoder import Encoder, Precision

ComputeFeatures = Callable[[nn.Module, Tensor], Tensor]
_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class _LiveNetwork(nn.Module):
    """Computes features with a network and a function of the user."""

    def __init__(self, network: nn.Module, compute_features: ComputeFeatures | None) -> None:
        super().__init__()
        self.network, self.compute_features = network, compute_features

    def forward(self, images: Tensor) -> Tensor:
        # Outside inference mode: a network may keep what it computes, such as positions, and train with it later.
        with torch.inference_mode(False), torch.no_grad():
            images = images.clone()
            if self.compute_features is None:
                return self.network(images)  # type: ignore[no-any-return]
            return self.compute_features(self.network, images)


@contextlib.contextmanager
def encode_live(
    network: nn.Module,
    *,
    name: str,
    compute_features: ComputeFeatures | None = None,
    image_pixels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Iterator[Encoder]:
    """Yield an encoder on a network as it is: not copied, on its own device, in its own dtype.

    In the block the network is in evaluation mode. Afterwards each of its modules is in the mode that it was in, and the
    states of global random generators are restored.

    Args:
        network: Maps normalised images (n, 3, S, S) to features (n, d), unless `compute_features` does.
        name: Name of the checkpoint in records and errors.
        compute_features: Gets the network and images, and returns features.
        image_pixels: Image size; None means the network's attribute of this name, or 224.
        mean: A value per channel on the [0, 1] scale; None means the network's attribute, or ImageNet's.
        std: The same.

    Raises:
        CheckpointError: An attribute is not valid.
        UsageError: The network has no parameters, or holds only a part of them: other ranks have the rest.
    """
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise UsageError("a network without parameters is not trained", where=name, hint="Give the network itself.")
    if any(type(weight).__name__ in ("DTensor", "FlatParameter") for weight in network.parameters()):
        hint = "Evaluate its saved checkpoints with msn-eval, or train without sharding."
        raise UsageError("the weights are sharded over ranks; one rank cannot compute features", where=name, hint=hint)
    live = _LiveNetwork(network, compute_features)
    for attribute, value in {"image_pixels": image_pixels, "mean": mean, "std": std}.items():
        if (stated := getattr(network, attribute, None) if value is None else value) is not None:
            setattr(live, attribute, stated)
    modes = [(module, module.training) for module in network.modules()]
    with restored_random_states(parameter.device):
        try:
            checkpoint = describe_own_network(live.eval(), path=name, name=name, file_format="py", hashed={})
            yield Encoder(
                checkpoint=checkpoint,
                network=live,
                device=parameter.device,
                precision=_PRECISIONS.get(parameter.dtype, "fp32"),
                transform=make_eval_transform(checkpoint.image_pixels, checkpoint.mean, checkpoint.std),
                taps=("out",),
                final_norm=nn.Identity(),
            )
        finally:
            for module, mode in modes:
                module.training = mode


@contextlib.contextmanager
def restored_random_states(device: torch.device) -> Iterator[None]:
    """Restore the states of the generators of Python, NumPy and torch, and of a CUDA device, after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
