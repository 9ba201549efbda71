"""Dry run of a pickle: Python's unpickler with stubs for all globals, so that torch.load sees only what is safe.

It refuses what torch.load would do without bounds: storages that the file does not hold, tensors that reach beyond their
storage, functions with arguments that no checkpoint has, keys that take very long to hash.
"""

import io
import pickle
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from msn_eval.checkpoints.formats.pickle_allowlist import DTYPES, STORAGE_DTYPES, STUBS, Dropped
from msn_eval.errors import CheckpointError, list_first, printable

_MAX_OPCODES = 1_000_000  # 3 seconds; a large checkpoint with its optimiser has 100,000
_MAX_KEY_ITEMS = 16
_MAX_DIMENSIONS = 64
_MAX_NAMES_SHOWN, _MAX_TEXT_LENGTH = 5, 120
_NOT_DENSE = ("sparse", "qtensor", "wrapper_subclass", "meta_tensor", "device_tensor", "QInt", "QUInt", "from_type_v2")
_RESAVE = "Save the state dict alone with torch.save's default protocol, best as .safetensors."


@dataclass(frozen=True)
class _Storage:
    nbytes: int
    dtype: torch.dtype


class _Tensor:
    pass


class _Tuple(tuple[object, ...]):
    def __hash__(self) -> int:
        # Nested tuples may share their parts: 60 levels of pairs take 2^60 steps.
        if len(self) > _MAX_KEY_ITEMS or any(isinstance(item, tuple) for item in self):
            raise ValueError("it has a dict or set with keys that are not plain values")
        return super().__hash__()


class _OrderedDict(dict[object, object]):
    def __setstate__(self, state: object) -> None: ...


def _encode(text: str | bytes = b"", encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):  # others import modules by their names
        raise ValueError("it encodes text in another way than checkpoints do")
    return text if isinstance(text, bytes) else text.encode("latin1")


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *rest: object) -> _Tensor:
    dtype = next((item for item in rest if isinstance(item, torch.dtype)), storage.dtype)
    is_valid = len(size) == len(stride) <= _MAX_DIMENSIONS
    is_valid = is_valid and all(type(number) is int and number >= 0 for number in (offset, *size, *stride))
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if is_valid else 0
    if not is_valid or offset + (0 if 0 in size else last + 1) > storage.nbytes // dtype.itemsize:
        raise ValueError("it has a tensor that reaches beyond its storage")
    return _Tensor()


def _rebuild_parameter(tensor: _Tensor, *_: object) -> _Tensor:
    return tensor


_HOOKS = (_OrderedDict, type(None))  # None in files of the first releases
_TENSOR_TYPES = (_Storage, int, tuple, tuple, bool, _HOOKS, (dict, torch.dtype), dict)
# Functions that torch.load may call: what does their work in the dry run, and the types of their arguments.
_FUNCTIONS: dict[str, tuple[Callable[..., object], tuple[Any, ...]]] = {
    "collections.OrderedDict": (_OrderedDict, (list,)),
    "collections.Counter": (Counter, (dict,)),
    "torch.Size": (_Tuple, ((tuple, list),)),
    "torch.device": (Dropped, (str, int)),
    "torch.serialization._get_layout": (Dropped, (str,)),
    **{f"torch._utils._rebuild_tensor{version}": (_rebuild_tensor, _TENSOR_TYPES) for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_parameter": (_rebuild_parameter, (_Tensor, bool, _HOOKS)),
    "torch._utils._rebuild_parameter_with_state": (_rebuild_parameter, (_Tensor, bool, _HOOKS, (dict, tuple))),
    "torch.nn.parameter.Parameter": (_rebuild_parameter, (_Tensor, bool)),
    "_codecs.encode": (_encode, (str, str)),
    "builtins.set": (set, ((list, tuple),)),
    "builtins.complex": (complex, (float, float)),
    "builtins.bytearray": (_encode, ((bytes, str), str)),
}


def _call(name: str, *arguments: object) -> object:
    function, types = _FUNCTIONS[name]
    if len(arguments) > len(types) or not all(map(isinstance, arguments, types)):
        raise ValueError(f"it calls {name} as no checkpoint does")
    return function(*arguments)


_ALLOWED: dict[str, object] = STUBS | DTYPES | {name: partial(_call, name) for name in _FUNCTIONS}
_ALLOWED |= {name: _Storage(0, dtype) for name, dtype in STORAGE_DTYPES.items()}


class _DryRun(pickle._Unpickler):
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def __init__(self, stream: io.BytesIO, file_bytes: int) -> None:
        super().__init__(stream, encoding="utf-8")
        self.work_left = file_bytes + (1 << 20)
        self.names: dict[str, None] = {}
        self.storage_bytes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.names[f"{module}.{name}"] = None
        return _ALLOWED.get(f"{module}.{name}", Dropped)

    def persistent_load(self, pid: object) -> _Storage:
        match pid:  # files before PyTorch 1.6 have None at the end
            case ("storage", _Storage(0, dtype), str(key), str(), int(items), *rest) if rest in ([], [None]):
                storage = _Storage(items * dtype.itemsize, dtype)
            case _:
                raise ValueError("it names something that is not a storage")
        if items < 0 or self.storage_bytes.setdefault(key, storage.nbytes) != storage.nbytes:
            raise ValueError("it gives a storage two sizes")
        return storage


def _load_tuple(run: _DryRun, *, load: Callable[[Any], None]) -> None:
    load(run)
    run.stack[-1] = _Tuple(run.stack[-1])


def _load_call_or_state(run: _DryRun, *, load: Callable[[Any], None]) -> None:
    target, argument = run.stack[-2:]
    is_call = callable(target) and isinstance(argument, tuple)
    if not is_call and not isinstance(target, Dropped | _OrderedDict):
        raise ValueError("it calls or changes something that is not a named function or object")
    # Bound what is copied or hashed: values that are shared would multiply.
    values = argument if is_call else (argument,)
    run.work_left -= 1 + sum(len(value) for value in values if isinstance(value, str | tuple | list | dict | bytes))
    if run.work_left < 0:
        raise ValueError("it makes more values than a file of its size can hold")
    load(run)


for _opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _DryRun.dispatch[_opcode[0]] = partial(_load_tuple, load=_DryRun.dispatch[_opcode[0]])
for _opcode in (pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD):
    _DryRun.dispatch[_opcode[0]] = partial(_load_call_or_state, load=_DryRun.dispatch[_opcode[0]])


def dry_run_pickle(
    stream: io.BytesIO, *, file_bytes: int, sha256: str
) -> tuple[object, dict[str, int], tuple[str, ...]]:
    """Carry out the pickle at the stream's position with stubs, and leave the stream at its end.

    The storages may hold `file_bytes` together; `sha256` of the file is for the error.

    Returns:
        The pickle's value, made of stubs; the bytes of each storage that the file must hold; notes for the user.

    Raises:
        CheckpointError: The pickle names a global that is not on the allowlist, or torch.load would fail or need more
            time or memory than the file's size justifies.
    """
    start = stream.tell()
    run = _DryRun(stream, file_bytes)
    protocol, value, problem = 0, None, None
    try:
        for count, (opcode, _, _) in enumerate(pickletools.genops(stream)):
            protocol = max(protocol, opcode.proto)
            if count >= _MAX_OPCODES:
                raise ValueError(f"it has more than {_MAX_OPCODES:,} operations")
        stream.seek(start)
        value = run.load()
    except Exception as error:  # on damaged files the unpickler raises nearly anything
        problem = str(error)
    dropped = [name for name in run.names if STUBS.get(name) is Dropped]
    notes = (f"left out: {', '.join(dropped)}",) if dropped else ()
    if foreign := [name for name in run.names if name not in _ALLOWED]:
        raise _foreign_globals(foreign, dropped, sha256)
    if protocol > 2:
        raise CheckpointError(f"saved with pickle protocol {protocol}", hint=_RESAVE)
    if (claimed := sum(run.storage_bytes.values())) > file_bytes:
        problem = f"it claims {claimed:,} bytes of weights, more than the file holds"
    if problem is not None:
        what = f"cannot be read in full, its pickle is damaged: {_list_names([problem])}"
        raise CheckpointError(what, hint=f"Fetch it again from where it was published. {_RESAVE}")
    return value, run.storage_bytes, notes


def _foreign_globals(foreign: list[str], dropped: list[str], sha256: str) -> CheckpointError:
    known = f"\n  left out while loading: {_list_names(dropped)}" if dropped else ""
    hint = (
        "Loading it could run code from the file, so it is refused. Open it where it was made, or in a sandbox without "
    )
    hint += "network if you do not trust its origin, and save the state dict alone, best as .safetensors."
    if all(name.startswith("torch.") and any(kind in name for kind in _NOT_DENSE) for name in foreign):
        hint = "Only dense tensors are read. Where it was made, save `{name: tensor.to_dense()}` as .safetensors."
    what = f"holds more than tensors and plain values:\n  found: {_list_names(foreign)}{known}\n  sha256: {sha256}"
    return CheckpointError(what, hint=hint)


def _list_names(names: list[str]) -> str:
    """Escape and shorten texts that an attacker may have chosen."""
    shown = list_first([name[:_MAX_TEXT_LENGTH] for name in names], _MAX_NAMES_SHOWN)
    return printable(shown).replace("\n", "\\n").replace("\t", "\\t")
