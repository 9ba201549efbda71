"""A pickle carried out on paper: which tensors it would make of which bytes, before torch makes any of them.

The machine is torch's own restricted unpickler, opcode for opcode, except that a call leaves a note of its kind instead
of a value: of a dict the items with names, of a tensor where its values lie. What torch would do without end or without
bounds is found here: a storage that the file does not hold, a tensor that reaches beyond its storage, a function with
arguments that no checkpoint gives it, a key that takes for ever to hash.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import torch

from msn_eval.checkpoints.formats.pickle_allowlist import (
    CALLS,
    DTYPES,
    STAND_INS,
    STORAGE_DTYPES,
    TENSOR_MAKERS,
    PlainDict,
    damaged_pickle,
    full_name,
    operations,
)
from msn_eval.errors import CheckpointError

_MOST_CALLS = 150_000  # as many small tensors take 4 seconds; a large checkpoint with its optimiser has 5,000
_LONGEST_KEY = 16
_MOST_DIMENSIONS = 64
_SCALARS = (str, int, float, bytes, type(None))
_WITH_ITEMS = ("dict", "collections.OrderedDict", "collections.Counter")
_SAVE_PLAINLY = "Save the state dict alone with torch.save, best as .safetensors."


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes that a pickle says the file holds.

    key:   what the file calls the whole of them
    start: of these, behind the first byte of the whole
    dtype: of an item
    """

    key: str
    start: int
    bytes: int
    dtype: torch.dtype

    @property
    def items(self) -> int:
        return self.bytes // self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where a tensor lies in its storage; offset and strides in its own items."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(kw_only=True, eq=False, slots=True)
class Made:
    """In place of a value: its kind, how many items it holds, of a dict those with names, of a tensor its extent."""

    kind: str
    items: int = 0
    named: dict[str, object] = field(default_factory=dict)
    extent: Extent | None = None


@dataclass(frozen=True, kw_only=True)
class Named:
    """In place of a function or class: its full name."""

    name: str


@dataclass(kw_only=True, eq=False, slots=True)
class Rehearsal:
    """What came of a pickle so far.

    storages:      by their keys; views are parts of them, by keys of their own
    claimed_bytes: of all storages
    calls, work:   the functions called, and the items that they were given
    value:         what the pickle gives
    """

    storages: dict[str, Storage] = field(default_factory=dict)
    views: dict[str, Storage] = field(default_factory=dict)
    claimed_bytes: int = 0
    calls: int = 0
    work: int = 0
    value: object = None


def rehearse(stream: BinaryIO, *, most_bytes: int, where: str) -> Rehearsal:
    """Carry out the pickle at the stream's position on paper; leave the stream behind its end.

    most_bytes: how much the storages may hold together
    Raises CheckpointError where torch would fail, or would not end within the means of the file's size.
    """
    seen = Rehearsal()
    stack: list[object] = []
    marks: list[list[object]] = []
    memo: dict[int, object] = {}
    try:
        for opcode, argument in operations(stream, where=where):
            match opcode.name:
                case "BINPUT" | "LONG_BINPUT":
                    memo[cast(int, argument)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[cast(int, argument)])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                    stack.append(argument)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "TUPLE":
                    stack, items = marks.pop(), stack
                    stack.append(tuple(items))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(opcode.name[-1])
                    stack[-size:] = [_exactly(stack[-size:], size)]
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append(Made(kind="dict"))
                case "EMPTY_SET":
                    stack.append(Made(kind="builtins.set"))
                case "APPEND":
                    _append([stack.pop()], stack[-1], where)
                case "APPENDS":
                    stack, items = marks.pop(), stack
                    _append(items, stack[-1], where)
                case "SETITEM":
                    items = [stack.pop(), stack.pop()][::-1]
                    _set_items(items, stack[-1], where)
                case "SETITEMS":
                    stack, items = marks.pop(), stack
                    _set_items(items, stack[-1], where)
                case "GLOBAL":
                    stack.append(Named(name=full_name(str(argument))))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_call(function, arguments, seen, where))
                case "BUILD":
                    state, target = stack.pop(), stack[-1]
                    _build(target, state, seen, where)
                case "BINPERSID":
                    stack.append(_claim(stack.pop(), seen, most_bytes, where))
                case "PROTO":
                    if argument != 2:
                        raise _other_writer(opcode.name, cast(int, argument), where)
                case "STOP":
                    seen.value = stack.pop()
                case _:
                    raise _other_writer(opcode.name, opcode.proto, where)
            if seen.calls > _MOST_CALLS or seen.work > (most_bytes + (1 << 20)):
                raise _beyond("makes more values than a file of its size can hold", where)
    except (IndexError, KeyError) as error:
        raise damaged_pickle("it takes a value that it never gave", where) from error
    return seen


def _exactly(items: list[object], size: int) -> tuple[object, ...]:
    if len(items) != size:
        raise IndexError
    return tuple(items)


def _append(items: list[object], target: object, where: str) -> None:
    if type(target) is not list:
        raise _beyond("appends to something that is no list", where)
    target.extend(items)


def _set_items(items: list[object], target: object, where: str) -> None:
    if isinstance(target, Made) and target.kind == "collections.defaultdict":
        raise CheckpointError(
            "holds a collections.defaultdict with items",
            where=where,
            hint="Turn it into a plain dict where it was made, `dict(it)`, and save that, best as .safetensors.",
        )
    if not isinstance(target, Made) or target.kind not in _WITH_ITEMS:
        raise _beyond("puts items into something that is no dict", where)
    if len(items) % 2 or not all(_is_cheap_key(key) for key in items[::2]):
        raise _beyond("holds a dict with keys that are no plain values", where)
    target.items += len(items) // 2
    target.named.update(
        (key, value) for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str)
    )


def _is_cheap_key(key: object) -> bool:
    """Tell whether hashing takes a moment: tuples of tuples, each twice the one before, would take for ever."""
    if type(key) is tuple:
        return len(key) <= _LONGEST_KEY and all(isinstance(one, _SCALARS) for one in key)
    return isinstance(key, (*_SCALARS, Named))


def _call(function: object, arguments: object, seen: Rehearsal, where: str) -> object:
    if not isinstance(function, Named) or type(arguments) is not tuple:
        raise _beyond("calls something that is no named function", where)
    name = function.name
    seen.calls += 1
    seen.work += len(arguments) + sum(_length(one) for one in arguments)
    if name in STAND_INS:
        return Made(kind="dict" if STAND_INS[name] is PlainDict else name)
    if name in TENSOR_MAKERS:
        return Made(kind="tensor", extent=_extent(name, arguments, where))
    if not any(_fits(arguments, kinds) for kinds in CALLS.get(name, ())):
        raise _beyond(f"calls {name} as no checkpoint does", where)
    if name == "torch.Size":
        return tuple(arguments[0])
    if name.startswith(("torch._utils._rebuild_parameter", "torch.nn.parameter")):
        return arguments[0]  # the tensor that it is made of
    made = Made(kind=name, items=sum(_length(one) for one in arguments))
    if name == "collections.OrderedDict" and arguments:
        made.named.update((key, value) for key, value in arguments[0] if isinstance(key, str))
    return made


def _length(value: object) -> int:
    if isinstance(value, Made):
        return value.items
    return len(value) if isinstance(value, (str, tuple, list)) else 0


_KINDS: dict[str, Callable[[object], bool]] = {
    "str": lambda value: isinstance(value, str),
    "latin1": lambda value: value in ("latin1", "latin-1") if isinstance(value, str) else False,
    "int": lambda value: type(value) is int,
    "float": lambda value: isinstance(value, float),
    "bool": lambda value: isinstance(value, bool),
    "bytes": lambda value: isinstance(value, Made) and value.kind == "_codecs.encode",
    # None in files of the first releases.
    "hooks": lambda value: value is None or (isinstance(value, Made) and value.kind == "collections.OrderedDict"),
    "pair": lambda value: isinstance(value, tuple) and len(value) == 2,
    "flat": lambda value: isinstance(value, (tuple, list)) and all(isinstance(one, _SCALARS) for one in value),
    "pairs": lambda value: (
        isinstance(value, list)
        and all(isinstance(one, (tuple, list)) and len(one) == 2 and _is_cheap_key(one[0]) for one in value)
    ),
}


def _fits(arguments: tuple[object, ...], kinds: tuple[str, ...]) -> bool:
    return len(arguments) == len(kinds) and all(map(_is_of_kind, arguments, kinds))


def _is_of_kind(value: object, kind: str) -> bool:
    if kind in _KINDS:
        return _KINDS[kind](value)
    return isinstance(value, Made) and value.kind == kind


def _build(target: object, state: object, seen: Rehearsal, where: str) -> None:
    seen.work += _length(state)
    if not isinstance(target, Made):
        raise _beyond("sets the state of something that has none", where)
    if target.kind == "collections.OrderedDict" and isinstance(state, Made) and state.kind == "dict":
        return
    if target.kind not in STAND_INS:
        raise _beyond(f"sets the state of a {target.kind}", where)


def _claim(claim: object, seen: Rehearsal, most_bytes: int, where: str) -> Storage:
    """Note the storage of a persistent id ("storage", type, key, device, items), in old files with a view or None."""
    seen.calls += 1
    if type(claim) is not tuple:
        raise _beyond("names something that is no storage", where)
    match claim:
        case ("storage", Named(name=kind), str(key), str(), int(items), *views) if (
            items >= 0 and kind in STORAGE_DTYPES and key not in seen.views and len(views) < 2
        ):
            dtype = STORAGE_DTYPES[kind]
            whole = Storage(key=key, start=0, bytes=items * dtype.itemsize, dtype=dtype)
        case _:
            raise _beyond("names something that is no storage", where)
    if key not in seen.storages:
        seen.storages[key] = whole
        seen.claimed_bytes += whole.bytes
    if seen.storages[key].bytes != whole.bytes:
        raise _beyond("gives a storage two sizes", where)
    if seen.claimed_bytes > most_bytes:
        raise _beyond(f"claims {seen.claimed_bytes:,} bytes of weights, more than the file holds", where)
    return _part(whole, views[0], seen, where) if views and views[0] is not None else whole


def _part(whole: Storage, view: object, seen: Rehearsal, where: str) -> Storage:
    item_bytes = whole.dtype.itemsize
    match view:
        case (str(key), int(offset), int(size)) if offset >= 0 and size >= 0 and offset + size <= whole.items:
            start = offset * item_bytes
            part = Storage(key=whole.key, start=start, bytes=size * item_bytes, dtype=whole.dtype)
        case _:
            raise _beyond("takes a part of a storage that reaches beyond it", where)
    # torch keeps parts and wholes under one roof: a part named as a whole would come out in the size of the other.
    if key in seen.storages or seen.views.setdefault(key, part) != part:
        raise _beyond("gives a storage two sizes", where)
    return part


def _extent(name: str, arguments: tuple[object, ...], where: str) -> Extent:
    match name.rpartition("_")[2], arguments:
        case "tensor", (Storage() as storage, offset, tuple() as size, tuple() as stride):
            dtype = storage.dtype
        case "v2", (Storage() as storage, offset, tuple() as size, tuple() as stride, bool(), hooks, *metadata):
            dtype = storage.dtype
            _check_extras(hooks, metadata, where)
        case "v3", (
            Storage() as storage,
            offset,
            tuple() as size,
            tuple() as stride,
            bool(),
            hooks,
            Named() as kind,
            *metadata,
        ) if kind.name in DTYPES:
            dtype = DTYPES[kind.name]
            _check_extras(hooks, metadata, where)
        case _:
            raise _beyond("makes a tensor of something that is no storage", where)
    if not _lies_within(storage.bytes // dtype.itemsize, offset, size, stride):
        raise _beyond("holds a tensor that reaches beyond its storage", where)
    counts = (cast(tuple[int, ...], size), cast(tuple[int, ...], stride))
    return Extent(storage=storage, dtype=dtype, offset=cast(int, offset), size=counts[0], stride=counts[1])


def _check_extras(hooks: object, metadata: Collection[object], where: str) -> None:
    if not _is_of_kind(hooks, "hooks") or not _fits(tuple(metadata), ("dict",) * min(len(metadata), 1)):
        raise _beyond("holds a tensor with more than its values", where)


def _lies_within(items: int, offset: object, size: tuple[object, ...], stride: tuple[object, ...]) -> bool:
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        return False
    sizes = [one for one in size if type(one) is int and one >= 0]
    strides = [one for one in stride if type(one) is int and one >= 0]
    if len(sizes) != len(size) or len(strides) != len(stride) or type(offset) is not int or offset < 0:
        return False
    if 0 in sizes:
        return offset <= items
    return offset + sum((one - 1) * step for one, step in zip(sizes, strides, strict=True)) < items


def _other_writer(operation: str, protocol: int, where: str) -> CheckpointError:
    what = f"saved with pickle protocol {protocol}" if protocol > 2 else "not written by torch.save"
    return CheckpointError(
        f"{what} (pickle operation {operation})",
        where=where,
        hint="Save the state dict with torch.save's default protocol, or better as .safetensors.",
    )


def _beyond(what: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"{what}; it is damaged, or made to do harm",
        where=where,
        hint="Fetch it again, from where it was published. " + _SAVE_PLAINLY,
    )
