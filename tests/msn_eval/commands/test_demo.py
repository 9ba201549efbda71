from pathlib import Path

from msn_eval import evaluate
from msn_eval.checkpoints.checkpoint import locate_weights, read_checkpoint
from msn_eval.commands.demo import CHECKPOINTS


def test_the_checkpoint_that_ships_beats_pixels_and_the_untrained_network(tmp_path: Path) -> None:
    results = evaluate(
        list(CHECKPOINTS), data="digits", subsets=["1img", "2imgs", "5imgs"], out=tmp_path, device="cpu", no_cache=True
    )

    top1: dict[tuple[str, str], float] = {}
    for result in results:
        assert result.metrics is not None
        place = (result.checkpoint.path, result.split.subset)
        top1[place] = top1.get(place, 0.0) + result.metrics.top1 / 3
    for subset in ("1img", "2imgs", "5imgs"):
        assert top1["demo", subset] > top1["pixels", subset] > top1["random:demo", subset]


def test_the_checkpoint_that_ships_is_small_and_says_what_it_is() -> None:
    path, _ = locate_weights("demo")
    checkpoint = read_checkpoint("demo")

    assert path.stat().st_size < 2_000_000
    assert (checkpoint.name, checkpoint.epoch, checkpoint.image_pixels) == ("demo", 170, 16)
    assert read_checkpoint("random:demo").arch == checkpoint.arch
