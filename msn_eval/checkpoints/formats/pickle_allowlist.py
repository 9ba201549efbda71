"""Names that a checkpoint may ask for: what tensors are made of, and classes whose values we do without.

The second kind is never the library's own class but a stand-in of ours that takes any arguments and keeps nothing.
"""

import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Self

import torch

from msn_eval.errors import CheckpointError, printable

MOST_PICKLE_BYTES = 128 << 20  # what a checkpoint holds beside its tensors; those of ViT-H with its optimiser take 1 MB
MOST_OPCODES = 1_000_000  # 3 seconds to look at and to load; a large checkpoint with its optimiser has 100,000
_LONGEST_SHOWN_OPCODE = 120


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
                    hint="Save the state dict alone, best as .safetensors.",
                )
            yield opcode, argument
    except (ValueError, OverflowError) as error:  # what genops says of junk, UnicodeDecodeError included
        if len(data) == MOST_PICKLE_BYTES:
            raise too_large(where) from error
        reason = printable(str(error).partition("\n")[0][:_LONGEST_SHOWN_OPCODE])
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
        hint="The file is damaged, truncated or of another kind; fetch it again.",
    )


def too_large(where: str) -> CheckpointError:
    """Give the refusal of a pickle above the size that is looked at."""
    return CheckpointError(
        f"holds a pickle of more than {MOST_PICKLE_BYTES:,} bytes beside its tensors",
        where=where,
        hint="Save the state dict alone, best as .safetensors.",
    )


_SHOWN = 5
_LONGEST_SHOWN = 100


class Dropped:
    """Stand-in for a value that we do without: takes anything, keeps nothing."""

    def __new__(cls, *_: object) -> Self:
        """Leave out the arguments."""
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        """Leave out the arguments."""

    def __setstate__(self, state: object) -> None:
        """Leave out the state."""


class PlainDict:
    """Stand-in for a dict with attributes: becomes a plain dict, which takes items."""

    def __new__(cls, *_: object) -> dict[object, object]:  # type: ignore[misc]
        """Give an empty dict."""
        return {}


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY_TYPES = (
    *("Bool", "Bytes", "Complex128", "Complex64", "Float16", "Float32", "Float64", "Int16", "Int32", "Int64", "Int8"),
    *("LongLong", "Object", "Str", "UInt16", "UInt32", "UInt64", "UInt8", "Void"),
)
_OMEGACONF_NODES = ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "InterpolationResult", "Path", "String")
_DROPPED = (
    "argparse.Namespace",
    "collections.defaultdict",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "str", "tuple")),
    *(f"{module}.{name}" for module in _NUMPY for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray")),
    *(f"numpy.dtypes.{name}DType" for name in _NUMPY_TYPES),
    *(
        f"{module}.{kind}{flavour}Path"
        for module in ("pathlib", "pathlib._local")
        for kind, flavour in (
            ("", ""),
            ("", "Posix"),
            ("", "Windows"),
            ("Pure", ""),
            ("Pure", "Posix"),
            ("Pure", "Windows"),
        )
    ),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(f"omegaconf.nodes.{name}Node" for name in _OMEGACONF_NODES),
)
_PLAIN_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
STAND_INS: dict[str, type] = dict.fromkeys(_DROPPED, Dropped) | dict.fromkeys(_PLAIN_DICTS, PlainDict)

# By name, so that a newer torch does not silently widen what is accepted.
STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.storage.UntypedStorage": torch.uint8,
}
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
TENSOR_MAKERS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
# What the other functions of torch and Python may be given: no argument here can take long or much memory.
CALLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "collections.OrderedDict": ((), ("pairs",)),
    "collections.Counter": ((), ("dict",)),
    "torch.Size": (("flat",),),
    "torch.device": (("str",), ("str", "int")),
    "torch.serialization._get_layout": (("str",),),
    "torch._utils._rebuild_parameter": (("tensor", "bool", "hooks"),),
    "torch._utils._rebuild_parameter_with_state": (
        ("tensor", "bool", "hooks", "dict"),
        ("tensor", "bool", "hooks", "pair"),
    ),
    "torch.nn.parameter.Parameter": (("tensor",), ("tensor", "bool")),
    "_codecs.encode": (("str", "latin1"),),
    "builtins.set": ((), ("flat",)),
    "builtins.complex": (("float", "float"),),
    "builtins.bytearray": ((), ("bytes",), ("str", "latin1")),
}
ACCEPTED = frozenset((*STAND_INS, *STORAGE_DTYPES, *DTYPES, *TENSOR_MAKERS, *CALLS))
_NOT_DENSE = ("sparse", "qtensor", "wrapper_subclass", "meta_tensor", "device_tensor", "QInt", "QUInt", "from_type_v2")


def stand_ins() -> AbstractContextManager[None]:
    """Give the context in which torch loads our stand-ins for the vetted names, and nothing else beyond its own."""
    context: AbstractContextManager[None] = torch.serialization.safe_globals(
        [(kind, name) for name, kind in STAND_INS.items()]
    )
    return context


def vetted_names(scan: PickleScan) -> tuple[str, ...]:
    """Give the names in a pickle whose values are left out."""
    return tuple(name for name in scan.names if STAND_INS.get(name) is Dropped)


def check_names(scan: PickleScan, *, sha256: str, where: str) -> None:
    """Refuse a pickle that asks for anything beyond tensors, plain values and what is vetted.

    Raises CheckpointError that lists what was found, what of it is vetted, and the file's SHA-256.
    """
    strange = [name for name in scan.names if name not in ACCEPTED]
    if not strange:
        return
    vetted = vetted_names(scan)
    left_out = f"\n  left out while loading: {_listed(vetted)}" if vetted else ""
    found = f"holds more than tensors and plain values:\n  found: {_listed(strange)}{left_out}\n  sha256: {sha256}"
    if all(any(part in name for part in _NOT_DENSE) and name.startswith("torch.") for name in strange):
        hint = "Only dense tensors are read. Where it was made, save `{name: tensor.to_dense()}` as .safetensors."
    else:
        hint = (
            "Loading it could run code from the file, so it is refused. Open it where it was made, or in a sandbox without "
            "network if its origin is not yours, and save the state dict alone, best as .safetensors."
        )
    raise CheckpointError(found, where=where, hint=hint)


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    # An attacker chooses these texts; one of a line's length is enough of them.
    return ", ".join(_spelled(name) for name in names[:_SHOWN]) + more


def _spelled(name: str) -> str:
    shown = name.replace("\n", "\\n").replace("\t", "\\t")
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"
