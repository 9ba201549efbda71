"""Data sets by name: each gives its training and validation images as ImageSets over one class map."""

from pathlib import Path

from msn_eval.data.dataset import DataSet
from msn_eval.data.digits import read_digits
from msn_eval.data.folder import read_folder, read_folder_split
from msn_eval.data.imagenet import is_imagenet, read_imagenet, read_imagenet_split
from msn_eval.data.images import ImageSet
from msn_eval.data.webdataset import read_webdataset, read_webdataset_split
from msn_eval.errors import UsageError

__all__ = ["DATASETS", "DataSet", "read_dataset", "read_split"]

DATASETS = {
    "DIR": "an image folder: train/<class>/* and val/<class>/*; or ImageNet as distributed: train tars read in place, "
    "flat val with devkit, synset file or LOC_val_solution.csv",
    "wds:DIR": "a WebDataset: train-*.tar and val-*.tar with a .cls beside each image, and classes.txt",
    "hf:NAME_OR_DIR": "a Hugging Face data set: its splits train and validation, else test",
    "digits": "scikit-learn's handwritten digits, embedded: 1,000 train, 797 val, 10 classes",
}


def read_dataset(name: str, *, allow_class_mismatch: bool = False, cache_dir: Path | None = None) -> DataSet:
    """Read the data set called `name`.

    name:   `digits`, `wds:` and a folder, `hf:` and a name or folder, or the path of an image folder or of ImageNet as
            it is distributed
    memory: a folder to remember long listings in, or None to list everything anew
    Raises DataError when it is missing, empty, or its splits differ in their classes.
    """
    scheme, place = _scheme(name)
    match scheme:
        case "digits":
            return read_digits()
        case "hf":
            from msn_eval.data.huggingface import read_hub

            return read_hub(place, allow_class_mismatch=allow_class_mismatch)
        case "wds":
            return read_webdataset(place, allow_class_mismatch=allow_class_mismatch, cache_dir=cache_dir)
        case _ if is_imagenet(Path(name)):
            return read_imagenet(name, allow_class_mismatch=allow_class_mismatch, cache_dir=cache_dir)
        case _:
            return read_folder(name, allow_class_mismatch=allow_class_mismatch, cache_dir=cache_dir)


def read_split(name: str, split: str, *, cache_dir: Path | None = None) -> ImageSet:
    """Read the `train` or `val` images of a data set without asking for the other."""
    if split not in ("train", "val"):
        raise UsageError(f"split {split!r}: a data set has the splits train and val")
    scheme, place = _scheme(name)
    match scheme:
        case "digits":
            digits = read_digits()
            return digits.train if split == "train" else digits.val
        case "hf":
            from msn_eval.data.huggingface import read_hub_split

            return read_hub_split(place, split)
        case "wds":
            return read_webdataset_split(place, split, cache_dir=cache_dir)
        case _ if is_imagenet(Path(name)):
            return read_imagenet_split(name, split, cache_dir=cache_dir)
        case _:
            return read_folder_split(name, split, cache_dir=cache_dir)


def _scheme(name: str) -> tuple[str, str]:
    """Give what stands before the colon of `wds:` and `hf:` and what follows it; any other name is a path."""
    scheme, colon, place = name.partition(":")
    if name == "digits":
        return "digits", ""
    if not colon or scheme not in ("wds", "hf"):
        return "", name
    if not place:
        raise UsageError(
            f"--data {name}: a folder or a name is missing after the colon",
            hint="Known: DIR, wds:DIR, hf:NAME_OR_DIR, digits.",
        )
    return scheme, place
