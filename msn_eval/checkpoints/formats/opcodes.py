"""The opcodes of a pickle, read and counted without carrying out any of them."""

import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from msn_eval.errors import CheckpointError, printable

MOST_PICKLE_BYTES = 128 << 20  # what a checkpoint holds beside its tensors; those of ViT-H with its optimiser take 1 MB
MOST_OPCODES = 1_000_000  # 3 seconds to look at and to load; a large checkpoint with its optimiser has 100,000
_LONGEST_SHOWN = 120


@dataclass(frozen=True, kw_only=True)
class PickleScan:
    """What a pickle says about itself.

    names:    the functions and classes that it asks for, as module.name, in the order of their first use
    protocol: the highest that one of its opcodes needs
    opcodes:  their count
    end:      the position in the stream right behind it
    """

    names: tuple[str, ...]
    protocol: int
    opcodes: int
    end: int


def operations(stream: BinaryIO, *, where: str) -> Iterator[tuple[pickletools.OpcodeInfo, object]]:
    """Give the opcodes of the pickle at the stream's position with their arguments; leave the stream behind its end.

    Raises CheckpointError where it is cut short, no pickle, or larger than any checkpoint needs.
    """
    start = stream.tell()
    data = stream.read(MOST_PICKLE_BYTES)
    bounded = io.BytesIO(data)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):
            if count >= MOST_OPCODES:
                raise CheckpointError(
                    f"holds a pickle of more than {MOST_OPCODES:,} operations",
                    where=where,
                    remedy="Save the state dict alone, best as .safetensors.",
                )
            yield opcode, argument
    except (ValueError, OverflowError) as error:  # what genops says of junk, UnicodeDecodeError included
        if len(data) == MOST_PICKLE_BYTES:
            raise too_large(where) from error
        reason = printable(str(error).partition("\n")[0][:_LONGEST_SHOWN])
        raise damaged_pickle(reason, where) from error
    stream.seek(start + bounded.tell())


def scan_pickle(stream: BinaryIO, *, where: str) -> PickleScan:
    """Tell what the pickle at the stream's position asks for, whatever its protocol. Raises as `operations` does."""
    names: dict[str, None] = {}
    strings: list[str] = ["", ""]
    protocol = opcodes = 0
    for opcode, argument in operations(stream, where=where):
        opcodes += 1
        protocol = max(protocol, opcode.proto)
        match opcode.name:
            case "GLOBAL" | "INST":
                names[full_name(str(argument))] = None
            case "STACK_GLOBAL":
                # The two strings may also have been fetched from the memo; then this names two others, and refuses too.
                names[full_name(" ".join(strings))] = None
            case "EXT1" | "EXT2" | "EXT4":
                names[f"copyreg extension {argument}"] = None
            case _ if isinstance(argument, str):
                strings = [strings[1], argument]
    return PickleScan(names=tuple(names), protocol=protocol, opcodes=opcodes, end=stream.tell())


def full_name(argument: str) -> str:
    """Give `module name` as module.name, with the renamings of Python 2 that torch follows."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def damaged_pickle(reason: str, where: str) -> CheckpointError:
    """Give the refusal of a pickle that no writer made."""
    return CheckpointError(
        f"cannot be read in full, its pickle is damaged: {reason}",
        where=where,
        remedy="The file is damaged, truncated or of another kind; fetch it again.",
    )


def too_large(where: str) -> CheckpointError:
    """Give the refusal of a pickle above the size that is looked at."""
    return CheckpointError(
        f"holds a pickle of more than {MOST_PICKLE_BYTES:,} bytes beside its tensors",
        where=where,
        remedy="Save the state dict alone, best as .safetensors.",
    )
