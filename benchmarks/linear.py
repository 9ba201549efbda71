"""Compare the linear probe's grid trained together with its layers trained one by one: CPU seconds, as ratios within one run.

    python benchmarks/linear.py [--rounds 3] [--epochs 4] [--sizes 200x10x384,500x100x192,1000x100x384]

Sizes are images x classes x features. The grid is that of the protocol (39 layers), with batches of 256. `alone` trains
each layer with the same function, `torch` with nn.Linear, cross_entropy and torch.optim.SGD. All give the same layers
up to rounding, which large learning rates amplify; the largest difference between together and alone is printed. CPU
seconds of all threads are measured, because a busy machine changes them little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msn_eval.config.recipes import LinearRecipe
from msn_eval.probes.linear import Heads, Recipe, make_grid, train_heads

_BATCH = 256


def main() -> None:
    """Print the seconds of each variant, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--sizes", default="200x10x384,500x100x192,1000x100x384")
    options = parser.parse_args()
    grid = make_grid(LinearRecipe())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(grid)} layers, {options.epochs} epochs")
    for size in options.sizes.split(","):
        n, n_classes, d = map(int, size.split("x"))
        rows, labels = _clusters(n, n_classes, d)
        together, alone, by_torch = [], [], []
        apart = 0.0
        for _ in range(options.rounds):
            seconds, heads = _timed(lambda: [_train(rows, labels, list(grid), n_classes, options.epochs)])  # noqa: B023
            together.append(seconds)
            seconds, single = _timed(
                lambda: [_train(rows, labels, [one], n_classes, options.epochs) for one in grid]  # noqa: B023
            )
            alone.append(seconds)
            others = torch.cat([one.weights for one in single])
            apart = float(((heads[0].weights - others).abs().amax(dim=(1, 2)) / others.abs().amax(dim=(1, 2))).max())
            started = time.process_time()
            for one in grid:
                _train_by_torch(rows, labels, one, n_classes, options.epochs)
            by_torch.append(time.process_time() - started)
        print(
            f"{size:>14}  together {statistics.median(together):6.2f} s  alone {statistics.median(alone):6.2f} s  "
            f"torch {statistics.median(by_torch):6.2f} s  ratios {_ratio(together, alone)} and {_ratio(together, by_torch)}  "
            f"weights differ by at most {apart:.1e} of a layer's largest"
        )


def _clusters(n: int, n_classes: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    values = torch.randn(n_classes, d, generator=generator)[labels] + 2 * torch.randn(n, d, generator=generator)
    return torch.nn.functional.normalize(values), labels


def _train(rows: Tensor, labels: Tensor, recipes: list[Recipe], n_classes: int, epochs: int) -> Heads:
    generator = torch.Generator().manual_seed(0)
    return train_heads(
        rows, labels, recipes, n_classes=n_classes, epochs=epochs, batch_size=_BATCH, generator=generator
    )


def _train_by_torch(rows: Tensor, labels: Tensor, recipe: Recipe, n_classes: int, epochs: int) -> None:
    layer = torch.nn.Linear(rows.shape[1], n_classes)
    groups: list[dict[str, Any]] = [
        {"params": [layer.weight], "weight_decay": recipe.weight_decay},
        {"params": [layer.bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * -(-len(rows) // _BATCH))
    for _ in range(epochs):
        for some in torch.split(torch.randperm(len(rows)), _BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(rows[some]), labels[some]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def _timed(work: Callable[[], list[Heads]]) -> tuple[float, list[Heads]]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def _ratio(ours: list[float], theirs: list[float]) -> str:
    ratios = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
