"""Hub files: a folder with weights and a config.json beside them, as `save_pretrained` leaves it, read as plain data."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath

from msn_eval.errors import CheckpointError

# In the order of preference: what can hold nothing but tensors comes first.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
INDEX_SUFFIX = ".index.json"
_MAX_JSON_BYTES = 10_000_000
_SHOWN = 5
_LARGEST = sys.float_info.max  # JSON's integers may be larger, and then are no numbers here

Triple = tuple[float, float, float]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Give the weight files of a folder, by the first of WEIGHT_FILES that is there.

    Raises CheckpointError naming what is missing, damaged, or leads out of the folder.
    """
    first = next((name for name in WEIGHT_FILES if os.path.lexists(folder / name)), None)
    if first is None:
        raise CheckpointError(
            f"holds none of {', '.join(WEIGHT_FILES)}",
            where=str(folder),
            remedy="Give a folder that `save_pretrained` wrote, or the path of the weight file itself.",
        )
    if not first.endswith(INDEX_SUFFIX):
        return (_own_file(folder, first),)
    shards = shard_names(folder, first)
    missing = [name for name in shards if not os.path.lexists(folder / name)]
    if missing:
        raise CheckpointError(
            f"lacks {len(missing)} of the {len(shards)} files that {first} names: {', '.join(missing[:_SHOWN])}",
            where=str(folder),
            remedy="Fetch or copy them again; all of them are needed.",
        )
    return tuple(_own_file(folder, name) for name in shards)


def shard_names(folder: Path, index: str) -> tuple[str, ...]:
    """Read which files an index spreads the weights over.

    Raises CheckpointError for names that are not plain ones of the index's own kind, such as a pickle among safetensors.
    """
    named = _read_json(folder, index).get("weight_map")
    kind = PurePath(index.removesuffix(INDEX_SUFFIX)).suffix
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    odd = [name for name in names if PurePath(name).name != name or "\\" in name or PurePath(name).suffix != kind]
    if odd or not names:
        raise CheckpointError(
            f"names {odd[0]!r}, no plain name of a {kind} file beside it" if odd else "has no weight_map with files",
            where=str(folder / index),
            remedy="The index is damaged or hostile; fetch it again from where it was published.",
        )
    return tuple(names)


def read_hub_config(folder: Path) -> dict[str, object]:
    """Read a folder's config.json as plain data.

    Raises CheckpointError where it is missing or damaged, and where the folder wants its own code run.
    """
    if not os.path.lexists(folder / CONFIG):
        raise CheckpointError(
            f"holds no {CONFIG}",
            where=str(folder),
            remedy="Copy it from where the weights came from, or give the path of the weight file itself.",
        )
    config = _read_json(folder, CONFIG)
    _refuse_code(folder / CONFIG, config)
    if os.path.lexists(folder / PREPROCESSOR):
        _refuse_code(folder / PREPROCESSOR, _read_json(folder, PREPROCESSOR))
    return config


def image_statistics(folder: Path) -> tuple[Triple, Triple] | None:
    """Give mean and std a channel from a folder's preprocessor_config.json, None where it states neither.

    Zeros and ones where it says that images are not normalised.
    Raises CheckpointError where they are not three finite numbers each, or a std is not positive.
    """
    path = folder / PREPROCESSOR
    if not os.path.lexists(path):
        return None
    stated = _read_json(folder, PREPROCESSOR)
    if stated.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return stated_statistics(path, stated, "image_mean", "image_std")


def stated_statistics(
    path: Path, stated: Mapping[str, object], mean_name: str, std_name: str
) -> tuple[Triple, Triple] | None:
    """Give mean and std a channel that a file states under two names, None where it states neither.

    Raises CheckpointError where they are not three finite numbers each, or a std is not positive.
    """
    if stated.get(mean_name) is None and stated.get(std_name) is None:
        return None
    mean, std = _triple(path, stated, mean_name), _triple(path, stated, std_name)
    if min(std) <= 0:
        raise CheckpointError(f"{std_name} {list(std)} is not positive", where=str(path), remedy="Correct it by hand.")
    return mean, std


def _triple(path: Path, stated: Mapping[str, object], name: str) -> Triple:
    values = stated.get(name)
    if isinstance(values, list):
        numbers = [float(value) for value in values if type(value) in (int, float) and abs(value) <= _LARGEST]
        if len(numbers) == len(values) == 3:
            return numbers[0], numbers[1], numbers[2]
    raise CheckpointError(
        f"{name} is not three finite numbers: {str(values)[:60]}", where=str(path), remedy="Correct it by hand."
    )


def _refuse_code(path: Path, content: Mapping[str, object]) -> None:
    if "auto_map" in content:
        raise CheckpointError(
            "wants code of its own repository run (auto_map), which never happens here",
            where=str(path),
            remedy="Take a repository that transformers or timm knows without it, or wrap the network yourself: "
            "py:package.module:factory.",
        )


def _read_json(folder: Path, name: str) -> dict[str, object]:
    path = _own_file(folder, name)
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES:,} bytes")
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}", where=str(path), remedy="Check its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"is damaged: {str(error)[:160]}", where=str(path), remedy="Fetch it again from where it was published."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            "holds no JSON object", where=str(path), remedy="Fetch it again from where it was published."
        )
    return content


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):  # readers differ in which of the two they take
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {repeated[:60]!r} is there twice")
    return content


def _own_file(folder: Path, name: str) -> Path:
    """Give a file of a folder, and let a link lead nowhere but to the blobs of the cache that the folder is part of."""
    path, home = folder / name, folder.resolve()
    homes = [home]
    if (
        home.parent.name == "snapshots"
    ):  # CACHE/models--OWNER--NAME/snapshots/COMMIT; blobs may be shared by repositories
        homes += [(home.parents[1] / "blobs").resolve(), (home.parents[2] / "blobs").resolve()]
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a folder on the way is closed
        raise CheckpointError("is no readable file", where=str(path), remedy="Fetch or copy it again.")
    if not any(path.resolve().is_relative_to(one) for one in homes):
        raise CheckpointError(
            f"is a link that leads out of its folder, to {path.resolve()}",
            where=str(path),
            remedy="Put the file itself there where it is meant.",
        )
    return path
