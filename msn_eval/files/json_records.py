"""JSON objects as frozen dataclasses: every field present, of its type, and no other."""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")
_Reader = Callable[[Any], Any]
_PLAIN = (str, int, float, bool, NoneType)
_SEAL = "seal"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def parse_json(text: bytes) -> Any:
    """Parse strict JSON, without the NaN and Infinity that Python accepts. Raises ValueError."""
    return json.loads(text.decode(), parse_constant=_refuse)


def read_fields(kind: type[_Record], content: Any) -> _Record:
    """Build a `kind` from a JSON object. Fields may be records, mappings, literals, numbers, strings, and tuples of them.

    Raises ValueError naming a field that is missing, unknown or of another type.
    """
    record: _Record = _record_reader(cast(Hashable, kind), "")(content)
    return record


@cache
def _record_reader(kind: type[Any], where: str) -> _Reader:
    """Return the function that builds a `kind`. Types are resolved once here, not for each of thousands of records.

    Args:
        where: The object's place in the file, for errors.
    """
    prefix = f"{where}." if where else ""
    hints = get_type_hints(kind)
    plain = {name: types for name, hint in hints.items() if (types := _plain_types(hint)) is not None}
    readers = {name: _reader(hint, prefix + name) for name, hint in hints.items() if name not in plain}
    defaults = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    needed = hints.keys() - defaults.keys()
    finish = getattr(kind, "__post_init__", None)
    accepted_shapes: set[Any] = set()

    def check(content: dict[str, Any]) -> None:
        for name, value in content.items():
            if name in plain:
                if type(value) not in plain[name]:
                    raise _wrong_type(prefix + name, value)
            elif name not in readers:
                raise ValueError(f"{prefix}{name} is not a field of this schema")
        if not needed <= content.keys():
            raise ValueError(f"{prefix}{min(needed - content.keys())} is missing")

    def read(content: Any) -> Any:
        if type(content) is not dict:
            raise _wrong_type(where or "the file", content)
        # Only names and types are checked here, and thousands of records have the same.
        shape = (*content, *map(type, content.values()))
        if shape not in accepted_shapes:
            check(content)
            accepted_shapes.add(shape)
        record = object.__new__(kind)
        # The constructor of a frozen dataclass sets each field separately, which takes longer than everything else.
        record.__dict__.update(defaults)
        record.__dict__.update(content)
        for name, read_value in readers.items():
            if name in content:
                record.__dict__[name] = read_value(content[name])
        if finish is not None:
            finish(record)
        return record

    return read


def _plain_types(hint: Any) -> frozenset[type] | None:
    """Return the exact types of a plain value, None for a hint that is not plain.

    A bool is not a number here; a float may be written without its point.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(option not in _PLAIN for option in options):
        return None
    return frozenset({*options, int} if float in options else options)


def _reader(hint: Any, where: str) -> _Reader:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (inner,) = (option for option in arguments if option is not NoneType)
        read = _reader(inner, where)
        return lambda value: None if value is None else read(value)
    if is_dataclass(hint):
        return _record_reader(cast(Any, hint), where)
    item = arguments[0] if origin is tuple else arguments[-1]
    types = None if origin is Literal or item is object else _plain_types(item)
    length = len(arguments) if origin is tuple and Ellipsis not in arguments else None

    def read_checked(value: Any) -> Any:
        if origin is Literal:
            matches = type(value) is str and value in arguments
        else:
            matches = type(value) is (list if origin is tuple else dict) and length in (None, len(value))
            items = value.values() if matches and origin is not tuple else value
            matches = matches and (types is None or all(type(item) in types for item in items))
        if not matches:
            raise _wrong_type(where, value)
        return tuple(value) if origin is tuple else value

    return read_checked


def _wrong_type(where: str, value: Any) -> ValueError:
    return ValueError(f"{where} is of the wrong type: {json.dumps(value)[:60]}")


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys, no spaces and the shortest float that reads back, so that equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def add_seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object closed with `seal`, the SHA-256 of the canonical JSON of all its other fields."""
    fields = {name: value for name, value in content.items() if name != _SEAL}
    return {**fields, _SEAL: hashlib.sha256(canonical_json(fields).encode()).hexdigest()}


def pack_sealed(content: Mapping[str, Any]) -> bytes:
    """Return the canonical text of a JSON object, closed with its seal. `unpack_sealed` reads nothing else."""
    text = canonical_json(content)
    return f'{text[:-1]},"{_SEAL}":"{hashlib.sha256(text.encode()).hexdigest()}"}}'.encode()


def unpack_sealed(packed: bytes) -> dict[str, Any]:
    """Return the object that `pack_sealed` has packed. Faster than `remove_seal` for a million values.

    Raises ValueError if it was edited or damaged.
    """
    text, _, seal = packed.rpartition(f',"{_SEAL}":"'.encode())
    text += b"}"
    if seal != f'{hashlib.sha256(text).hexdigest()}"}}'.encode():
        raise ValueError("its seal does not match: it was edited or damaged")
    content: dict[str, Any] = parse_json(text)
    return content


def remove_seal(content: Any) -> dict[str, Any]:
    """Return the other fields of an object that `add_seal` closed.

    Raises ValueError if there is no seal, or if it does not match: the object was edited or damaged.
    """
    if type(content) is not dict or _SEAL not in content:
        raise ValueError("it has no seal")
    sealed = add_seal(content)
    if content[_SEAL] != sealed.pop(_SEAL):
        raise ValueError("its seal does not match: it was edited or damaged")
    return sealed
