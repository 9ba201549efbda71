"""`msn-eval inspect CKPT`: what is in a checkpoint and what would be used; nothing from it is executed."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from msn_eval.errors import format_count, printable

if TYPE_CHECKING:
    from msn_eval.checkpoints.inspection import Inspection

_MAX_NAMES = 5
_MAX_NETWORKS = 20
_MAX_NAME_LENGTH = 80
_MAX_LINE_LENGTH = 1000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoint", help="a file, a folder, or a name that `msn-eval ls checkpoints` lists for either"
    )
    parser.add_argument("--arch", metavar="NAME", help="the timm architecture, where the file leaves it open")
    parser.add_argument("--checkpoint-key", metavar="K", help="which of several networks")
    parser.add_argument("--json", action="store_true", help="everything, as JSON on stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the inspection. A file that can be read but not evaluated is not an error."""
    from msn_eval.checkpoints.checkpoint import locate_weights
    from msn_eval.checkpoints.inspection import inspect_checkpoint

    path, _ = locate_weights(options.checkpoint)
    inspection = inspect_checkpoint(path, arch=options.arch, key=options.checkpoint_key)
    if options.json:
        print(json.dumps(asdict(inspection), indent=1, allow_nan=False))
        return 0
    entries = list(_entries(inspection))
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        # Continued lines are indented, so that a name in the file cannot look like an entry.
        lines = (_cut(printable(line), _MAX_LINE_LENGTH) for line in text.split("\n"))
        print(f"{name:<{width}}  {f'{chr(10)}{chr(32) * (width + 2)}'.join(lines)}".rstrip())
    return 0


def _entries(inspection: "Inspection") -> Iterator[tuple[str, str]]:
    """Yield the entries as name and text; the name is empty where the previous entry continues."""
    yield "file", f"{inspection.path} ({inspection.container}, {inspection.file_bytes:,} bytes)"
    yield "sha256", inspection.sha256
    yield from (("note", note) for note in inspection.notes)
    shown = [network for number, network in enumerate(inspection.networks) if network.used or number < _MAX_NETWORKS]
    for number, network in enumerate(shown):
        used = f"  <- used: {inspection.why}" if network.used else ""
        name = _shorten(network.key) if network.key else "(the file itself)"
        size = f"{format_count(network.tensors, 'tensor')}, {format_count(network.values, 'value')}"
        yield "" if number else "networks", f"{name}: {size}{used}"
    if len(inspection.networks) > len(shown):
        yield "", f"and {len(inspection.networks) - len(shown):,} more"
    if inspection.epoch is not None:
        yield "epoch", str(inspection.epoch)
    if inspection.family is not None:
        yield "family", inspection.family
        yield "architecture", str(inspection.arch)
    if inspection.matched is not None:
        yield "parameters", f"{inspection.params:,}, {inspection.matched:.2%} of the values matched"
    if inspection.image_pixels is not None:
        patch = f", patches of {inspection.patch_pixels}" if inspection.patch_pixels else ""
        yield "images", f"{inspection.image_pixels} pixels{patch}"
    if inspection.mean is not None and inspection.std is not None:
        mean, std = (",".join(f"{value:.4g}" for value in values) for values in (inspection.mean, inspection.std))
        yield "mean, std", f"{mean}; {std} ({_on_one_line(str(inspection.mean_std_from))})"
    if inspection.positions is not None:
        yield "positions", inspection.positions
    info = inspection.statistics
    if info is not None and info["mean"] is not None:
        text = "mean {mean:.3g}, std {std:.3g}, from {minimum:.3g} to {maximum:.3g}".format_map(info)
        counts = f"{format_count(info['zeros'], 'zero')}, {info['not_finite']:,} not finite"
        yield "weights", f"{', '.join(info['dtypes'])}; {text}, {counts}"
    yield from _name_list("used", inspection.used)
    yield from _name_list("dropped", inspection.dropped)
    yield from _name_list("missing", inspection.missing)
    yield from _name_list("no place for", inspection.left_over)
    yield from _name_list(
        "reshaped", tuple(f"{_shorten(name)}: file {file}, model {model}" for name, file, model in inspection.reshaped)
    )
    yield from (("ALARM", _on_one_line(alarm)) for alarm in inspection.alarms)
    yield "verdict", "would be evaluated" if inspection.problem is None else f"would be REFUSED: {inspection.problem}"


def _name_list(label: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if names:
        more = f", … ({len(names):,} in all)" if len(names) > _MAX_NAMES else ""
        yield label, ", ".join(map(_shorten, names[:_MAX_NAMES])) + more


def _shorten(name: str) -> str:
    return _on_one_line(_cut(name, _MAX_NAME_LENGTH))


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\x0a").replace("\t", "\\x09")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
