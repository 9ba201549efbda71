"""The heads' layers, as the releases have them."""

import torch
from torch import nn

from msn_pretrain.methods.heads import projection_head, simsiam_predictor, simsiam_projector


def outline(head: nn.Module) -> list[str]:
    return [str(layer).split("(")[0] + "-".join(str(tuple(one.shape)) for one in layer.parameters()) for layer in head]


def test_head_of_msn_has_batch_norm_and_gelu_after_the_first_two_layers() -> None:
    assert outline(projection_head(4, hidden=6, output=3)) == [
        "Linear(6, 4)-(6,)",
        "SharedBatchNorm(6,)-(6,)",
        "GELU",
        "Linear(6, 6)-(6,)",
        "SharedBatchNorm(6,)-(6,)",
        "GELU",
        "Linear(3, 6)-(3,)",
    ]


def test_names_of_msns_head_are_those_of_the_release() -> None:
    head = projection_head(4, hidden=6, output=3)

    assert [name for name, _ in head.named_children()] == ["fc1", "bn1", "gelu1", "fc2", "bn2", "gelu2", "fc3"]


def test_head_without_batch_norm_has_none() -> None:
    assert not any("Norm" in line for line in outline(projection_head(4, hidden=6, output=3, batch_norm=False)))


def test_projector_of_simsiam_ends_in_a_batch_norm_without_weights() -> None:
    assert outline(simsiam_projector(4, output=6)) == [
        "Linear(6, 4)",
        "SharedBatchNorm(6,)-(6,)",
        "ReLU",
        "Linear(6, 6)",
        "SharedBatchNorm(6,)-(6,)",
        "ReLU",
        "Linear(6, 6)",
        "SharedBatchNorm",
    ]
    assert len(simsiam_projector(4, layers=2, output=6)) == 5


def test_predictor_of_simsiam_normalises_its_hidden_layer_alone() -> None:
    assert outline(simsiam_predictor(6, hidden=2)) == [
        "Linear(2, 6)",
        "SharedBatchNorm(2,)-(2,)",
        "ReLU",
        "Linear(6, 2)-(6,)",
    ]


def test_projections_of_a_batch_have_mean_zero_and_variance_one() -> None:
    rows = simsiam_projector(4, output=6)(torch.randn(64, 4))

    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(dim=0, correction=0), torch.ones(6), atol=1e-3, rtol=0)
