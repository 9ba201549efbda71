"""Projection and prediction heads, and BatchNorm over all ranks."""

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.distributed.collective import normalise_over_ranks, world_size
from msn_eval.errors import UsageError


def projection_head(width: int, *, hidden: int = 2048, output: int = 256, batch_norm: bool = True) -> nn.Sequential:
    """Build MSN's head: three linear layers, the first two followed by BatchNorm and GELU.

    The paper has another BatchNorm before the first layer; the release, which trained the published weights, does not. Layers
    have the release's names.

    Source: github.com/facebookresearch/msn, src/msn_train.py.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, inputs in ((1, width), (2, hidden)):
        layers[f"fc{number}"] = nn.Linear(inputs, hidden)
        if batch_norm:
            layers[f"bn{number}"] = nn.BatchNorm1d(hidden)
        layers[f"gelu{number}"] = nn.GELU()
    layers["fc3"] = nn.Linear(hidden, output)
    return cast(nn.Sequential, share_batch_norm(nn.Sequential(layers)))


def simsiam_projector(width: int, *, layers: int = 3, output: int = 2048) -> nn.Sequential:
    """Build SimSiam's projector: linear layers with BatchNorm, and ReLU between them. The last BatchNorm has no weights.

    Layers have no bias, because a BatchNorm follows. The release keeps the bias of its last layer at the initial value.

    Source: arXiv:2011.10566, section 3; github.com/facebookresearch/simsiam, simsiam/builder.py.
    """
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(width, output, bias=False), nn.BatchNorm1d(output), nn.ReLU(inplace=True)]
        width = output
    modules += [nn.Linear(width, output, bias=False), nn.BatchNorm1d(output, affine=False)]
    return cast(nn.Sequential, share_batch_norm(nn.Sequential(*modules)))


def simsiam_predictor(width: int, *, hidden: int = 512) -> nn.Sequential:
    """Build SimSiam's predictor: two linear layers, the first followed by BatchNorm and ReLU. Source: as `simsiam_projector`."""
    hidden_layer = (nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
    return cast(nn.Sequential, share_batch_norm(nn.Sequential(*hidden_layer, nn.Linear(hidden, width))))


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all ranks in training, like torch's SyncBatchNorm, but also on CPUs.

    Weights, buffers and their names are those of torch's BatchNorm, and so is the result on one rank. Values and gradients
    are exact.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Take both (n, channels) and (n, channels, height, width)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, channels, …) per channel."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        channels = (1, -1, *[1] * (input.dim() - 2))
        with torch.autocast(input.device.type, enabled=False):
            values = input if input.dtype == torch.float64 else input.float()
            normal, mean, variance, count = normalise_over_ranks(values, eps=self.eps)
            self._update_running_statistics(mean, variance, count)
            if self.affine:
                normal = normal * self.weight.view(channels) + self.bias.view(channels)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics. As in torch, the running variance is the unbiased one."""
        cast(Tensor, self.num_batches_tracked).add_(1)
        cast(Tensor, self.running_mean).lerp_(mean.to(self.running_mean), cast(float, self.momentum))
        variance = variance * count / (count - 1)
        cast(Tensor, self.running_var).lerp_(variance.to(self.running_var), cast(float, self.momentum))


def share_batch_norm(network: nn.Module) -> nn.Module:
    """Replace every BatchNorm in a network by `SharedBatchNorm`, in place, and return the network. Weights and names stay.

    Raises:
        UsageError: The network has batch normalisation of another kind, which would see the rows of its own rank only.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, SharedBatchNorm):
                what = f"{name} is a {type(module).__name__}, which does not support several ranks"
                hint = "Choose an encoder with plain BatchNorm, such as resnet50, or with LayerNorm."
                raise UsageError(what, hint=hint)
            module.__class__ = SharedBatchNorm
    return network
