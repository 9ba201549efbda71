"""Location of the data folders of the package: beside it in a checkout, inside it once installed."""

from pathlib import Path


def find_package_folder(name: str) -> Path:
    """Return the folder `configs`, `imagenet_subsets` or `reports` of this package."""
    package = Path(__file__).parents[1]
    installed = package / "shipped" / name
    return installed if installed.is_dir() else package.parent / name


def list_recipes(program: str) -> dict[str, Path]:
    """Return the shipped YAML files by name: of `eval`, for `msn-eval --config`, or of `pretrain`, for `msn-pretrain`."""
    return {path.stem: path for path in sorted((find_package_folder("configs") / program).glob("*.yaml"))}
