"""Normalisation: mean and std of the images that a network was trained on, and what states them."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from msn_eval.data.images import IMAGENET_MEAN, IMAGENET_STD
from msn_eval.errors import CheckpointError
from msn_eval.models.architectures import Architecture

Triple = tuple[float, float, float]
_MAX_VALUE = 255  # of a pixel
# Families whose own code, or whose publisher, normalises all images by ImageNet's mean and std.
_IMAGENET_FAMILIES = {
    *("msn", "dino", "ibot", "dinov2", "mae", "mocov3", "ijepa", "moco", "simsiam", "swav", "torchvision"),
}
# Families that leave mean and std to each training. timm's entry for their architecture is not about them.
_OPEN_FAMILIES = {"solo-learn", "lightly"}
# Keys of image processors that change pixel values in a way that no mean and std per channel can express.
_UNSUPPORTED_KEYS = (
    *("do_flip_channel_order", "do_color_quantize", "do_grayscale", "rescale_offset", "offset", "include_top"),
)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Mean and std per channel, on the [0, 1] scale.

    Attributes:
        source: What states them: a file, timm's entry, the user.
        is_assumed: Whether nothing does, so that they are a guess.
    """

    mean: Triple
    std: Triple
    source: str
    is_assumed: bool = False


IMAGENET = Normalisation(mean=IMAGENET_MEAN, std=IMAGENET_STD, source="ImageNet's")
ASSUMED = replace(IMAGENET, source="ImageNet's, assumed", is_assumed=True)


def choose_normalisation(
    architecture: Architecture, *, stated: Normalisation | None = None, family: str | None = None
) -> Normalisation:
    """Return the normalisation of a network: the stated one; timm's for a name with a tag; ImageNet's for a family whose
    authors use it; timm's for a name without a tag if all of its tags agree; otherwise ImageNet's, which is then a guess.

    Args:
        architecture: Of the network.
        stated: What the file or folder states.
        family: Whose layout the file has, None without a file.
    """
    if stated is not None:
        return stated
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

    name = architecture.timm_name or ""
    if "." in name and (entry := get_pretrained_cfg(name)) is not None:
        return read_normalisation(vars(entry), where=name, source=f"timm's {name}")
    if family in _IMAGENET_FAMILIES:
        return replace(IMAGENET, source=f"ImageNet's, as published for {family}")
    entries = {} if family in _OPEN_FAMILIES else get_arch_pretrained_cfgs(name)
    pairs = {(tuple(entry.mean), tuple(entry.std)): vars(entry) for entry in entries.values()}
    if len(pairs) == 1:
        source = f"timm's {name}, the same for all of its tags"
        return read_normalisation(*pairs.values(), where=name, source=source)
    why = f": timm's tags of {name} disagree" if pairs else ""
    return replace(ASSUMED, source=f"{ASSUMED.source}{why}")


def set_by_hand(own: Normalisation, mean: Triple | None, std: Triple | None) -> Normalisation:
    """Return a normalisation with the mean and the std that the user gave, if any."""
    if mean is None and std is None:
        return own
    given = " and ".join(f"--{name}" for name, value in (("mean", mean), ("std", std)) if value is not None)
    is_complete = mean is not None and std is not None
    return Normalisation(
        mean=mean or own.mean,
        std=std or own.std,
        source=given if is_complete else f"{given}; the other is {own.source}",
        is_assumed=own.is_assumed and not is_complete,
    )


def read_processor_normalisation(
    path: Path, stated: Mapping[str, object], *, model_type: object = None, has_defaults: bool = False
) -> Normalisation | None:
    """Return what the image processor of transformers does to pixel values, None where the folder has no processor.

    It computes (pixel * rescale_factor - image_mean) / image_std with pixels from 0 to 255, each step only if its `do_…` is
    true. What a file leaves out is the default of the processor's class. Keys of resize, crop and padding are ignored: the
    protocol's transform rule replaces them.

    Args:
        path: The file.
        stated: Its content; empty without a processor.
        model_type: Of the config.json beside it, for files that do not name a class.
        has_defaults: Whether the class may have other defaults than those of Vision Transformers.

    Raises:
        CheckpointError: A key cannot be honoured.
    """
    if not stated:
        return None
    where, source, scale = str(path), path.name, 1.0
    missing = [name for name in ("image_mean", "image_std") if stated.get(name) is None]
    processor: Any = _find_processor_class(stated, model_type) if has_defaults or missing else None
    names = (*_UNSUPPORTED_KEYS, "do_rescale", "do_normalize") if has_defaults else ()
    facts: dict[str, Any] = {name: getattr(processor, name, None) for name in (*names, *missing)}
    facts |= {name: value for name, value in stated.items() if name not in missing}
    for name in _UNSUPPORTED_KEYS:
        if facts.get(name):
            hint = "Wrap the network with its own preprocessing: py:package.module:factory."
            raise CheckpointError(f"{name} is {facts[name]!r:.60}, which is not supported", where=where, hint=hint)
    factor = facts.get("rescale_factor")
    if not _read_flag(facts, "do_rescale", where):
        scale = float(_MAX_VALUE)
    elif factor is not None:
        if type(factor) not in (int, float) or not 0 < factor < math.inf:
            what = f"rescale_factor is {factor!r:.60}, not a positive number"
            raise CheckpointError(what, where=where, hint="Correct the file.")
        scale = _MAX_VALUE * float(factor)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if _read_flag(facts, "do_normalize", where):
        if any(facts[name] is None for name in missing):
            what = f"states no {' and no '.join(missing)}, and transformers has no defaults for it"
            hint = "Write them into the file, or install transformers, which may know them: pip install 'msn-eval[hf]'."
            raise CheckpointError(what, where=where, hint=hint)
        source += f" and the defaults of {processor.__name__}" if missing else ""
        read = read_normalisation(facts, where=where, source=source, prefix="image_")
        mean, std = read.mean, read.std
    if scale != 1:
        source += f", its pixels from 0 to {scale:g}"
        mean, std = (cast(Triple, tuple(value / scale for value in triple)) for triple in (mean, std))
    return Normalisation(mean=mean, std=std, source=source)


def read_processor_pixels(stated: Mapping[str, object], model_type: str) -> int | None:
    """Return the side of the squares that an image processor of transformers makes, None where it states none."""
    processor = _find_processor_class(stated, model_type)
    crops = stated.get("do_center_crop", getattr(processor, "do_center_crop", None))
    size = stated.get("crop_size" if crops else "size")
    sides = {*size.values()} if isinstance(size, dict) else {size}
    side = str(*sides) if len(sides) == 1 else ""
    return int(side) if re.fullmatch(r"[1-9]\d{0,3}", side) else None


def _read_flag(stated: Mapping[str, object], name: str, where: str) -> bool:
    value = stated.get(name)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{name} is {value!r:.60}, not true or false", where=where, hint="Correct the file.")
    return value is not False  # the default of every processor of the supported model types


def _find_processor_class(stated: Mapping[str, object], model_type: object) -> Any:
    """Return transformers' class of an image processor, for the defaults of what its file leaves out; None without one."""
    try:
        import transformers
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    except ImportError:
        return None
    name = stated.get("image_processor_type") or stated.get("feature_extractor_type")
    if name is None:
        known = IMAGE_PROCESSOR_MAPPING_NAMES.get(str(model_type).removesuffix("_with_registers"), {})
        name = known.get("torchvision")
    name = str(name).replace("FeatureExtractor", "ImageProcessor")
    return getattr(transformers, name, None) if name.endswith(("ImageProcessor", "ImageProcessorFast")) else None


def read_normalisation(stated: Mapping[str, object], *, where: str, source: str, prefix: str = "") -> Normalisation:
    """Return mean and std that something states by their names, after a prefix.

    Raises:
        CheckpointError: They are not three finite numbers each, those of std positive.
    """
    mean, std = (_read_triple(stated.get(prefix + name), prefix + name, where=where) for name in ("mean", "std"))
    if min(std) <= 0:
        raise CheckpointError(f"{prefix}std {list(std)} is not positive", where=where, hint="Correct it.")
    return Normalisation(mean=mean, std=std, source=source)


def _read_triple(values: object, name: str, *, where: str) -> Triple:
    numbers = [value for value in values if type(value) in (int, float)] if isinstance(values, list | tuple) else []
    with suppress(OverflowError):  # JSON's integers may be larger than a float
        if len(numbers) == 3 == len(cast(Any, values)) and all(map(math.isfinite, numbers)):
            return cast(Triple, tuple(map(float, numbers)))
    what = f"{name} is not three finite numbers: {str(values)[:60]}"
    raise CheckpointError(what, where=where, hint="Use one per channel.")
