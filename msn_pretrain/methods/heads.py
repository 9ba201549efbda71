"""Heads: the small networks behind an encoder that only pre-training uses."""

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.distributed.collective import sum_over_ranks, world_size
from msn_eval.errors import UsageError


def projection_head(width: int, *, hidden: int = 2048, output: int = 256, batch_norm: bool = True) -> nn.Sequential:
    """Build MSN's head: three linear layers, after the first two BatchNorm and GELU.

    The paper puts a BatchNorm before the first layer, too; the release, which made the published weights, does not.
    Layers have the release's names. Source: github.com/facebookresearch/msn, src/msn_train.py.
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
    """Build SimSiam's projector: linear layers with BatchNorm, ReLU between them; the last BatchNorm has no weights.

    No layer has a bias, since a BatchNorm follows; the release holds its last layer's at its first value.
    Source: arXiv:2011.10566, section 3; github.com/facebookresearch/simsiam, simsiam/builder.py.
    """
    parts: list[nn.Module] = []
    for number in range(1, layers + 1):
        last = number == layers
        parts += [nn.Linear(width, output, bias=False), nn.BatchNorm1d(output, affine=not last)]
        parts += [] if last else [nn.ReLU(inplace=True)]
        width = output
    return cast(nn.Sequential, share_batch_norm(nn.Sequential(*parts)))


def simsiam_predictor(width: int, *, hidden: int = 512) -> nn.Sequential:
    """Build SimSiam's predictor: two linear layers, after the first BatchNorm and ReLU. Source: as the projector's."""
    parts = [
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, width),
    ]
    return cast(nn.Sequential, share_batch_norm(nn.Sequential(*parts)))


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all ranks while training, as torch's SyncBatchNorm, which has no CPU form.

    Weights, buffers and their names are those of torch's layers. On one rank it is torch's BatchNorm.
    The mean, then the mean squared distance from it, are each summed over ranks: exact, and so is their gradient.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation of a tensor of shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, channels, …) by channel."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        channels = (1, -1, *[1] * (input.dim() - 2))
        others = [0, *range(2, input.dim())]
        with torch.autocast(input.device.type, enabled=False):
            values = input if input.dtype == torch.float64 else input.float()
            own_count = values.new_full((1,), values.numel() / values.shape[1])
            sums = sum_over_ranks(torch.cat([values.sum(dim=others), own_count]))
            count = sums[-1].detach()
            mean = sums[:-1] / count
            centred = values - mean.view(channels)
            variance = sum_over_ranks(centred.square().sum(dim=others)) / count
            self._follow(mean.detach(), variance.detach(), count)
            normal = centred * (variance + self.eps).rsqrt().view(channels)
            if self.affine:
                normal = normal * self.weight.view(channels) + self.bias.view(channels)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, which hold the unbiased variance."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        cast(Tensor, self.num_batches_tracked).add_(1)
        share = self.momentum
        if share is None:
            share = 1.0 / float(cast(Tensor, self.num_batches_tracked))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)


def share_batch_norm(network: nn.Module) -> nn.Module:
    """Make every BatchNorm in `network` one over all ranks, in place, and give the network; weights and names stay.

    Raises UsageError for batch normalisation of another kind, which would go on to see its own rank's rows alone.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, SharedBatchNorm):
                raise UsageError(
                    f"{name} is a {type(module).__name__}, which has no form over several ranks here",
                    hint="Choose an encoder with plain BatchNorm, such as resnet50, or with LayerNorm.",
                )
            module.__class__ = SharedBatchNorm
    return network
