"""The heads' layers, as the releases have them."""

import pytest
import torch
from torch import Tensor, distributed, nn

from msn_eval.errors import UsageError
from msn_pretrain.methods.heads import (
    projection_head,
    share_batch_norm,
    simsiam_predictor,
    simsiam_projector,
)


def outline(head: nn.Module) -> str:
    """Return the name and the shape of the weight of each layer."""
    shapes = ((layer, next(layer.parameters(), torch.empty(0)).shape) for layer in head)
    return " ".join(f"{type(layer).__name__}{list(shape)}".replace(", ", "x") for layer, shape in shapes)


def test_head_of_msn_has_batch_norm_and_gelu_after_the_first_two_layers() -> None:
    blocks = "Linear[6x4] SharedBatchNorm[6] GELU[0] Linear[6x6] SharedBatchNorm[6] GELU[0]"
    assert outline(projection_head(4, hidden=6, output=3)) == f"{blocks} Linear[3x6]"


def test_names_of_msns_head_are_those_of_the_release() -> None:
    head, plain = projection_head(4, hidden=6, output=3), projection_head(4, hidden=6, output=3, batch_norm=False)

    assert [name for name, _ in head.named_children()] == ["fc1", "bn1", "gelu1", "fc2", "bn2", "gelu2", "fc3"]
    assert [name for name, _ in plain.named_children()] == ["fc1", "gelu1", "fc2", "gelu2", "fc3"]


def test_projector_of_simsiam_ends_in_a_batch_norm_without_weights() -> None:
    blocks = "Linear[6x4] SharedBatchNorm[6] ReLU[0] Linear[6x6] SharedBatchNorm[6] ReLU[0]"
    projector = simsiam_projector(4, output=6)
    assert outline(projector) == f"{blocks} Linear[6x6] SharedBatchNorm[0]"
    assert not any(layer.bias is not None for layer in projector if isinstance(layer, nn.Linear))
    assert len(simsiam_projector(4, layers=2, output=6)) == 5


def test_predictor_of_simsiam_normalises_only_its_hidden_layer() -> None:
    predictor = simsiam_predictor(6, hidden=2)
    assert outline(predictor) == "Linear[2x6] SharedBatchNorm[2] ReLU[0] Linear[6x2]"
    assert (predictor[0].bias is None, predictor[3].bias is None) == (True, False)


def small_layer(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layer = kind(3, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def some_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 100


def compute_loss(layer: nn.Module, rows: Tensor) -> Tensor:
    """Return a loss that is a sum over rows, so that ranks may add theirs."""
    return (layer(rows).sin() * torch.arange(3.0).view(1, 3, *[1] * (rows.dim() - 2))).sum()


def own_rows_through(layer: nn.Module, rows: Tensor, cut: int) -> dict[str, Tensor]:
    own = (rows[:cut], rows[cut:])[distributed.get_rank()].clone().requires_grad_()
    compute_loss(share_batch_norm(layer), own).backward()
    layer_gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    for gradient in layer_gradients.values():
        distributed.all_reduce(gradient)
    return {"rows": own.grad} | layer_gradients | dict(layer.named_buffers())


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (8, 3)), (nn.BatchNorm2d, (8, 3, 2, 2))])
def test_two_ranks_have_the_gradients_and_statistics_of_one(
    on_ranks, kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    first, second = on_ranks(own_rows_through, small_layer(kind), some_rows(*shape), 3)  # 3 rows and 5

    layer, rows = small_layer(kind), some_rows(*shape).requires_grad_()
    compute_loss(layer, rows).backward()

    torch.testing.assert_close(torch.cat([first["rows"], second["rows"]]), rows.grad, rtol=1e-9, atol=1e-11)
    expected = {name: parameter.grad for name, parameter in layer.named_parameters()} | dict(layer.named_buffers())
    for rank in (first, second):
        del rank["rows"]
        torch.testing.assert_close(rank, expected, rtol=1e-10, atol=0)


def count_collectives() -> list[int]:
    """Return the collectives of forward and of backward. This process is a fork and ends with this function."""
    calls: list[str] = []

    def counted(name: str, function):
        def call(*given, **options):
            calls.append(name)
            return function(*given, **options)

        return call

    for name in ("all_reduce", "all_gather"):
        setattr(distributed, name, counted(name, getattr(distributed, name)))
    loss = compute_loss(share_batch_norm(small_layer(nn.BatchNorm1d)), some_rows(8, 3).requires_grad_())
    forward = len(calls)
    loss.backward()
    return [forward, len(calls) - forward]


def test_batch_norm_takes_one_collective_forward_and_one_backward(on_ranks) -> None:
    assert on_ranks(count_collectives) == [[1, 1]] * 2


def test_on_one_rank_nothing_changes() -> None:
    layer, rows = small_layer(nn.BatchNorm1d), some_rows(8, 3)
    before = layer(rows)

    assert torch.equal(share_batch_norm(layer)(rows), before)


def test_names_of_weights_stay() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    names = list(network.state_dict())

    assert list(share_batch_norm(network).state_dict()) == names


class OtherNorm(nn.BatchNorm2d):
    """BatchNorm of another kind, such as those of timm with an activation inside."""


def test_batch_norm_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="1 is a OtherNorm"):
        share_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), OtherNorm(3)))
