"""A data set whose splits are folders called `SPLIT-images`, with one folder per class."""

from pathlib import Path

from msn_eval.data.dataset import DatasetListing, Listing, LoadOptions
from msn_eval.data.folder import FolderSource
from msn_eval.errors import DataError


def list_images(place: str, options: LoadOptions) -> DatasetListing:
    """List the PNG files of the requested splits below the folder `place`."""
    root = Path(place)
    splits = {}
    for split in options.splits:
        folder = root / f"{split}-images"
        if not folder.is_dir():
            raise DataError("No such folder", where=str(folder), hint="Write toy-folder:DIR.")
        files = {path.name: [file.name for file in path.glob("*.png")] for path in folder.iterdir() if path.is_dir()}
        splits[split] = Listing(files=files, source=FolderSource(folder))
    return DatasetListing(name="toy", splits=splits)
