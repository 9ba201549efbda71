"""DatasetCheck: what was found in a data set when every image of it was read and decoded. Needs no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from msn_eval.data.dataset import DataSet, class_map_sha256
from msn_eval.data.image_info import Progress, look_at_images
from msn_eval.data.imagenet_subsets import read_publication
from msn_eval.data.manifest import ManifestCheck, compare_manifest
from msn_eval.data.split_check import SplitCheck, check_split

_IMAGENET_TRAIN_IMAGES = 1_281_167


@dataclass(frozen=True, kw_only=True)
class DatasetCheck:
    """What was found in a data set.

    shared:      a validation image and the first training image of the same bytes, for each validation image that has one
    warnings:    how the counts differ from those of the known data set that has these classes
    """

    name: str
    splits: tuple[SplitCheck, ...]
    shared: tuple[tuple[str, str], ...]
    class_map_sha256: str
    warnings: tuple[str, ...]
    manifest: ManifestCheck | None = None

    @property
    def sound(self) -> bool:
        return not any(split.unreadable for split in self.splits) and (self.manifest is None or self.manifest.agrees)


def check_dataset(
    data: DataSet,
    *,
    workers: int | None = None,
    manifest: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> DatasetCheck:
    """Read and decode every image of both splits.

    workers:  processes; 0 does it here, None as many as there are cores
    manifest: SHA-256 of each `split/CLASS/FILE` that is expected
    Raises ResourceError where a process dies or hangs, naming the images that it was at.
    """
    splits = tuple(
        check_split(name, images, look_at_images(name, images, workers=workers, on_progress=on_progress))
        for name, images in (("train", data.train), ("val", data.val))
    )
    train, val = splits
    hashed = class_map_sha256(data.classes)
    return DatasetCheck(
        name=data.name,
        splits=splits,
        shared=shared_images(train.digests, val.digests),
        class_map_sha256=hashed,
        warnings=tuple(_count_warnings(hashed, train_images=train.images, val_images=val.images)),
        manifest=None if manifest is None else compare_manifest(manifest, splits),
    )


def shared_images(train: Mapping[str, bytes], val: Mapping[str, bytes]) -> tuple[tuple[str, str], ...]:
    """Give each validation image whose bytes a training image has too, with the first such image."""
    wanted = set(val.values())
    first: dict[bytes, str] = {}
    for image_id, digest in train.items():
        if digest in wanted:
            first.setdefault(digest, image_id)
    return tuple((image_id, first[digest]) for image_id, digest in val.items() if digest in first)


def _count_warnings(hashed: str, *, train_images: int, val_images: int) -> Iterator[str]:
    """Say how the counts differ from those of the data set that has these classes, where it is a known one."""
    known = read_publication()
    if hashed != known.class_map_sha256:
        return
    for split, found, expected in (
        ("train", train_images, _IMAGENET_TRAIN_IMAGES),
        ("val", val_images, known.val_images),
    ):
        if found != expected:
            yield f"these are ImageNet's classes, but {split} has {found:,} images instead of {expected:,}"
