"""HubName: what stands behind `hf:`, taken apart."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from msn_eval.errors import DataError

_CONFIG_AND_REVISION = r"(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
_ON_THE_HUB = re.compile(rf"(?P<place>[\w.-]+/[\w.-]+){_CONFIG_AND_REVISION}", re.ASCII)
_IN_A_FOLDER = re.compile(r"(?P<place>.+):(?P<config>[\w.+-]+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class HubName:
    """What stands behind `hf:`, taken apart. `folder` is None for a data set of the hub."""

    text: str
    place: str
    config: str | None
    revision: str | None
    folder: Path | None

    def __str__(self) -> str:
        return f"hf:{self.text}"

    @property
    def short(self) -> str:
        if self.folder is None:
            return self.text
        return f"{self.folder.name}:{self.config}" if self.config else self.folder.name


def parse_name(text: str) -> HubName:
    """Take a name apart; a folder that exists goes before the hub's name of the same spelling."""
    for place, config in ((text, None), *((found["place"], found["config"]) for found in _matches(_IN_A_FOLDER, text))):
        folder = os.path.expanduser(place)  # noqa: PTH111 - Path knows no folder of a name too long for the disk
        if os.path.isdir(folder):  # noqa: PTH112
            return HubName(text=text, place=place, config=config, revision=None, folder=Path(folder).resolve())
    for found in _matches(_ON_THE_HUB, text):
        if ".." not in text and not text.startswith("."):
            return HubName(text=text, folder=None, **found.groupdict())
    raise DataError(
        "is neither a folder that exists nor OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME@REVISION on the hub",
        where=f"hf:{text}",
        remedy="Write for example hf:uoft-cs/cifar10, or the path of a folder with train-*.parquet and "
        "validation-*.parquet. An image folder is given by its path, without hf:.",
    )


def _matches(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    found = pattern.fullmatch(text)
    return [] if found is None else [found]
