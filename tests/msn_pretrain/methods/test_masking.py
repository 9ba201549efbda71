"""Which patches a masked view keeps."""

import pytest
import torch

from msn_eval.errors import UsageError
from msn_pretrain.methods.masking import keep_patches, kept_count, kept_patches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 196), (0.15, 166), (0.3, 137), (0.7, 58)])
def test_as_many_patches_are_kept_as_in_the_release(ratio: float, kept: int) -> None:
    assert kept_count(196, ratio) == kept


def test_kept_patches_differ_and_ascend() -> None:
    kept = kept_patches(100, 0.3, generator(), images=20)

    assert kept.shape == (20, 70)
    assert (kept.diff(dim=1) > 0).all()


def test_every_patch_is_kept_as_often_as_any_other() -> None:
    kept = kept_patches(10, 0.5, generator(), images=20_000)

    # Of 20,000 sets a patch is in half; 5 standard deviations are 354.
    assert torch.bincount(kept.flatten(), minlength=10).sub(10_000).abs().max() < 354


def test_one_set_for_a_batch_is_uniform_over_sets() -> None:
    one = generator()
    sets = torch.tensor([int((2 ** kept_patches(4, 0.5, one)).sum()) for _ in range(6_000)])

    _, counts = sets.unique(return_counts=True)
    assert len(counts) == 6
    assert counts.sub(1_000).abs().max() < 145  # 5 standard deviations


def test_the_generator_alone_decides() -> None:
    torch.manual_seed(1)
    first = kept_patches(50, 0.5, generator(3), images=2)
    torch.manual_seed(2)

    assert torch.equal(first, kept_patches(50, 0.5, generator(3), images=2))
    assert not torch.equal(first, kept_patches(50, 0.5, generator(4), images=2))


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.95, float("nan")])
def test_a_view_that_would_keep_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="keeps none"):
        kept_count(16, ratio)


def test_prefix_tokens_stay_and_each_image_keeps_its_own() -> None:
    tokens = torch.arange(2 * 5).view(2, 5, 1)

    kept = keep_patches(tokens, torch.tensor([[0, 2], [1, 3]]), prefix=1)

    assert kept[..., 0].tolist() == [[0, 1, 3], [5, 7, 9]]
    assert keep_patches(tokens, torch.tensor([3]), prefix=1)[..., 0].tolist() == [[0, 4], [5, 9]]
