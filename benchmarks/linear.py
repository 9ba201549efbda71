"""The grid of the linear probe trained at once against its layers one by one: seconds as a ratio in one run.

    python benchmarks/linear.py [--rounds 3] [--epochs 4] [--sizes 200x10x384,500x100x192,1000x100x384]

Sizes are images x classes x features; the grid is the protocol's (39 layers), batches of 256, no validation images. Both ways
give the same layers but for rounding, which large learning rates amplify: the largest difference is printed.
"""

import argparse
import statistics
import time

import torch

from msn_eval.protocols.linear import Linear
from msn_eval.protocols.linear_probe import Heads, Recipe, train_heads


def main() -> None:
    """Print seconds of both ways and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--sizes", default="200x10x384,500x100x192,1000x100x384")
    options = parser.parse_args()
    grid = Linear().grid
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(grid)} layers, {options.epochs} epochs")
    for size in options.sizes.split(","):
        n, n_classes, d = map(int, size.split("x"))
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(n) % n_classes
        rows = torch.nn.functional.normalize(
            torch.randn(n_classes, d, generator=generator)[labels] + 2 * torch.randn(n, d, generator=generator)
        )

        def train(recipes: list[Recipe]) -> Heads:
            return train_heads(
                rows,  # noqa: B023
                labels,  # noqa: B023
                recipes,
                n_classes=n_classes,  # noqa: B023
                epochs=options.epochs,
                batch_size=256,
                generator=torch.Generator().manual_seed(0),
            )

        together, alone = [], []
        apart = 0.0
        for _ in range(options.rounds):
            started = time.perf_counter()
            heads = train(list(grid))
            together.append(time.perf_counter() - started)
            started = time.perf_counter()
            single = [train([one]) for one in grid]
            alone.append(time.perf_counter() - started)
            others = torch.cat([one.weights for one in single])
            apart = float(((heads.weights - others).abs().amax(dim=(1, 2)) / others.abs().amax(dim=(1, 2))).max())
        ratio = statistics.median(one / other for one, other in zip(together, alone, strict=True))
        print(
            f"{size:>14}  together {statistics.median(together):6.2f} s  alone {statistics.median(alone):6.2f} s  "
            f"ratio {ratio:.2f}  weights apart by at most {apart:.1e} of a layer's largest"
        )


if __name__ == "__main__":
    main()
