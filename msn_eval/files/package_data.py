"""Where the data folders that travel with the package are: beside it in a checkout, inside it once installed."""

from pathlib import Path


def shipped_folder(name: str) -> Path:
    """Give the folder `configs`, `imagenet_subsets` or `reports` as it came with this package."""
    package = Path(__file__).parents[1]
    inside = package / "shipped" / name
    return inside if inside.is_dir() else package.parent / name
