"""`msn-eval inspect CKPT`: what is in a checkpoint and what would be used; nothing from it is run."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from msn_eval.errors import printable

if TYPE_CHECKING:
    from msn_eval.checkpoints.inspection import Inspection

_SHOWN = 5
_NETWORKS_SHOWN = 20
_LONGEST = 80  # of a name, in characters
_WIDEST = 1000  # of a line


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "checkpoint", help="a file, a folder, or a name that `msn-eval ls checkpoints` lists for either"
    )
    parser.add_argument("--arch", metavar="NAME", help="the timm architecture, where the file leaves it open")
    parser.add_argument("--checkpoint-key", metavar="K", help="which of several networks")
    parser.add_argument("--json", action="store_true", help="everything, as JSON on stdout")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the inspection; a file that can be read is no error, whether or not it can be evaluated."""
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
        # Lines that go on are indented, so that no name of the file's can pass for an entry of ours.
        lines = (_cut(printable(line), _WIDEST) for line in text.split("\n"))
        print(f"{name:<{width}}  {f'{chr(10)}{chr(32) * (width + 2)}'.join(lines)}".rstrip())
    return 0


def _entries(facts: "Inspection") -> Iterator[tuple[str, str]]:
    """Give what there is to say, a name and a line each; the name is empty where a line goes on."""
    yield "file", f"{facts.path} ({facts.container}, {facts.file_bytes:,} bytes)"
    yield "sha256", facts.sha256
    yield from (("note", note) for note in facts.notes)
    shown = [network for number, network in enumerate(facts.networks) if network.used or number < _NETWORKS_SHOWN]
    for number, network in enumerate(shown):
        used = f"  <- used: {facts.why}" if network.used else ""
        name = _name(network.key) if network.key else "(the file itself)"
        yield "" if number else "networks", f"{name}: {network.tensors:,} tensors, {network.values:,} values{used}"
    if len(facts.networks) > len(shown):
        yield "", f"and {len(facts.networks) - len(shown):,} more"
    if facts.epoch is not None:
        yield "epoch", str(facts.epoch)
    if facts.family is not None:
        yield "family", facts.family
        yield "architecture", str(facts.arch)
    if facts.matched is not None:
        yield "parameters", f"{facts.params:,}, {facts.matched:.2%} of the values matched"
    if facts.image_pixels is not None:
        patch = f", patches of {facts.patch_pixels}" if facts.patch_pixels else ""
        yield "images", f"{facts.image_pixels} pixels{patch}"
    if facts.positions is not None:
        yield "positions", facts.positions
    yield from _statistics(facts)
    yield from _names("used", facts.used)
    yield from _names("dropped", facts.dropped)
    yield from _names("missing", facts.missing)
    yield from _names("no place for", facts.left_over)
    yield from _names(
        "reshaped", tuple(f"{_name(name)}: file {file}, model {model}" for name, file, model in facts.reshaped)
    )
    yield from (("ALARM", _on_one_line(alarm)) for alarm in facts.alarms)
    yield "verdict", "would be evaluated" if facts.problem is None else f"would be REFUSED: {facts.problem}"


def _statistics(facts: "Inspection") -> Iterator[tuple[str, str]]:
    found = facts.statistics
    if found is None or found.mean is None:
        return
    yield (
        "weights",
        f"{', '.join(found.dtypes)}; mean {found.mean:.3g}, std {found.std:.3g}, from {found.minimum:.3g} to "
        f"{found.maximum:.3g}, {found.zeros:,} zeros, {found.not_finite:,} not finite",
    )


def _names(what: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if names:
        more = f", … ({len(names):,} in all)" if len(names) > _SHOWN else ""
        yield what, ", ".join(map(_name, names[:_SHOWN])) + more


def _name(name: str) -> str:
    return _on_one_line(_cut(name, _LONGEST))


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\x0a").replace("\t", "\\x09")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
