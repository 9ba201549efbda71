"""JSON objects into frozen dataclasses: every field there, of its type, and no other."""

import json
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

_Record = TypeVar("_Record")
_Reader = Callable[[Any], Any]
_PLAIN = (str, int, float, bool, NoneType)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def parse_json(text: bytes) -> Any:
    """Parse JSON as it is defined: NaN and Infinity, which Python would take, are no JSON. Raises ValueError."""
    return _DECODER.decode(text.decode("utf-8"))


def read_fields(kind: type[_Record], content: Any) -> _Record:
    """Build a `kind` from a JSON object; its fields may be records, mappings, literals, numbers, texts, and tuples of them.

    Raises ValueError naming a field that is missing, unknown or of another type.
    """
    record: _Record = _record_reader(cast(Hashable, kind), "")(content)
    return record


@cache
def _record_reader(kind: type[Any], where: str) -> _Reader:
    """Give the function that builds a `kind`. Types are looked up here, once, and not for each of thousands of records.

    where: the object's place in the file, for errors
    """
    prefix = f"{where}." if where else ""
    hints = get_type_hints(kind)
    plain = {name: types for name, hint in hints.items() if (types := _plain_types(hint)) is not None}
    others = {name: _reader(hint, prefix + name) for name, hint in hints.items() if name not in plain}
    needed = {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
    defaults = {one.name: one.default for one in fields(kind) if one.default is not MISSING}
    assert needed | defaults.keys() == hints.keys(), f"{kind}: a default of each record's own is not read here"
    finish = getattr(kind, "__post_init__", None)
    seen_to_fit: set[Any] = set()

    def check(content: dict[str, Any]) -> None:
        for name, value in content.items():
            if name in plain:
                if type(value) not in plain[name]:
                    raise _wrong_type(prefix + name, value)
            elif name not in others:
                raise ValueError(f"{prefix}{name} is no field of this schema")
        if not needed <= content.keys():
            raise ValueError(f"{prefix}{min(needed - content.keys())} is missing")

    def read(content: Any) -> Any:
        if type(content) is not dict:
            raise _wrong_type(where or "the file", content)
        # Names and types are all that is checked here, and thousands of records have the same.
        shape = (*content, *map(type, content.values()))
        if shape not in seen_to_fit:
            check(content)
            seen_to_fit.add(shape)
        record = object.__new__(kind)
        # A frozen dataclass would set each field by itself, which takes longer than all the rest.
        record.__dict__.update(defaults)
        record.__dict__.update(content)
        for name, read_other in others.items():
            if name in content:
                record.__dict__[name] = read_other(content[name])
        if finish is not None:
            finish(record)
        return record

    return read


def _plain_types(hint: Any) -> frozenset[type] | None:
    """Give the types that a value may be of, exactly, or None where that does not say all.

    A truth is no number here, and a float may be written without its point.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(one not in _PLAIN for one in options):
        return None
    return frozenset({*options, int} if float in options else options)


def _reader(hint: Any, where: str) -> _Reader:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (inner,) = (one for one in arguments if one is not NoneType)
        read = _reader(inner, where)
        return lambda value: None if value is None else read(value)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return _record_reader(hint, where)
    fits: Callable[[Any], bool]
    if origin is Literal:
        fits = lambda value: type(value) is str and value in arguments  # noqa: E731
    elif origin is tuple:
        fits = _tuple_rule(arguments)
    else:
        assert issubclass(origin, Mapping), hint
        types = None if arguments[1] is object else _plain_types(arguments[1])
        fits = lambda value: (  # noqa: E731
            type(value) is dict and (types is None or all(type(one) in types for one in value.values()))
        )

    def read_checked(value: Any) -> Any:
        if not fits(value):
            raise _wrong_type(where, value)
        return tuple(value) if origin is tuple else value

    return read_checked


def _tuple_rule(arguments: tuple[Any, ...]) -> Callable[[Any], bool]:
    types = _plain_types(arguments[0])
    assert types is not None
    length = None if Ellipsis in arguments else len(arguments)
    return lambda value: (
        type(value) is list and (length is None or len(value) == length) and all(type(one) in types for one in value)
    )


def _wrong_type(where: str, value: Any) -> ValueError:
    text = json.dumps(value)
    return ValueError(f"{where} is of the wrong type: {text if len(text) <= 60 else f'{text[:60]}…'}")


def canonical_json(value: object) -> str:
    """Give JSON with sorted keys, no spaces and the shortest float that reads back: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
