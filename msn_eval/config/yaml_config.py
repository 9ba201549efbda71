"""Config: a YAML file, options and `key=value` overrides into a frozen dataclass; unknown keys are refused."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

from msn_eval.errors import UsageError, did_you_mean

_Record = TypeVar("_Record")


def read_config(
    kind: type[_Record],
    *,
    file: Path | None = None,
    given: Mapping[str, object] | None = None,
    overrides: Iterable[str] = (),
    translate: Callable[[Mapping[str, object], str], Mapping[str, object]] | None = None,
) -> _Record:
    """Build a `kind` from its defaults, then `file`, then `given`, then `overrides`, the last one winning.

    file:      YAML with the fields' names; `-` stands for `_`
    overrides: `key=value`, the value in YAML
    translate: makes a `kind`'s fields of the file's content and place, where the file may be another program's
    Raises UsageError naming the file and the key for unknown keys and values of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException, ValidationError

    layers: list[tuple[str, Mapping[str, object]]] = []
    if file is not None:
        content: Mapping[str, object] = _read_yaml(file)
        layers.append((str(file), content if translate is None else translate(content, str(file))))
    layers.append(("options", given or {}))
    layers += [(f"override {text!r}", _read_override(kind, text)) for text in overrides]
    config: Any = OmegaConf.structured(kind)
    for part in (config, *(section for section in config.values() if OmegaConf.is_config(section))):
        OmegaConf.set_readonly(part, False)  # they inherit that from frozen dataclasses
    for where, layer in layers:
        for section, owner, name, value in _leaves(kind, layer, where):
            try:
                OmegaConf.update(config, f"{section}{name}", _as_field(owner, name, value))
                settled: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
                settled = settled[section[:-1]] if section else settled
                if isinstance(settled[name], list) and any(isinstance(part, list | dict) for part in settled[name]):
                    raise ValidationError("a list or mapping inside the list")
            except OmegaConfBaseException as error:
                reason = str(error).partition("\n")[0]
                raise UsageError(
                    f"{section}{name.rstrip('_')}: {reason}",
                    where=where,
                    hint=f"It takes: {_described(owner, name)}.",
                ) from error
    return cast(_Record, OmegaConf.to_object(config))


def _leaves(
    kind: type[object], layer: Mapping[str, object], where: str
) -> Iterator[tuple[str, type[object], str, object]]:
    """Give each value of a layer with its section (`linear.`, or nothing), the record that it belongs to, and its field.

    A section is a field that is a record itself; its keys stand below it, or behind it and a point.
    """
    for key, value in layer.items():
        head, point, rest = key.partition(".")
        name = _field_name(kind, head, where)
        inner = _type_of(kind, name)
        if not is_dataclass(inner):
            yield "", kind, _field_name(kind, key, where), value
            continue
        assert isinstance(inner, type)
        below = {rest: value} if point else asdict(value) if isinstance(value, inner) else value
        if not isinstance(below, Mapping):
            raise UsageError(
                f"{name} is a section, not a value",
                where=where,
                hint=f"Write {name}.KEY=VALUE, or keys below {name}:.",
            )
        for one, given in below.items():
            yield f"{name}.", inner, _field_name(inner, str(one), where, section=f"{name}."), given


def _read_yaml(file: Path) -> dict[str, object]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except FileNotFoundError:
        raise UsageError("no such config file", where=str(file), hint="Give the path of a YAML file.") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        endless = isinstance(error, RecursionError)
        reason = "it refers to itself, or is nested too deeply" if endless else " ".join(str(error).split())
        raise UsageError(f"cannot be read as YAML: {reason}", where=str(file), hint="Correct the file.") from error
    if not isinstance(content, dict):
        raise UsageError("is no mapping of keys to values", where=str(file), hint="Write `key: value` lines.")
    return {str(key): value for key, value in content.items()}


def _read_override(kind: type[object], text: str) -> dict[str, object]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"{text!r} is not of the form key=value", hint="Write for example limit=10.")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UsageError(f"{text!r}: the value is no YAML", hint="Quote it for the shell.") from error
    read = content["value"]
    types = [_type_of(owner, name) for _, owner, name, _ in _leaves(kind, {key: read}, f"override {text!r}")]
    if isinstance(read, int | float) and types[0] in (str, str | None):
        return {key: value.strip()}  # as its option gives it: YAML would make 7 of a folder called 007
    return {key: read}


def _type_of(kind: type[object], name: str) -> object:
    assert is_dataclass(kind)
    return next(one.type for one in fields(kind) if one.name == name)


def _field_name(kind: type[object], key: str, where: str, *, section: str = "") -> str:
    assert is_dataclass(kind)
    names = {one.name.rstrip("_"): one.name for one in fields(kind)}
    normal = key.replace("-", "_").rstrip("_")
    if normal not in names:
        raise UsageError(
            f"unknown key {section + key!r}.{did_you_mean(normal, names)}",
            where=where,
            hint=f"Known{f' in {section[:-1]}' if section else ''}: {', '.join(names)}.",
        )
    return names[normal]


def _as_field(kind: type[object], name: str, value: object) -> object:
    """Let a list field take `a,b` or a single value, as its option does."""
    if get_origin(_type_of(kind, name)) is not list or isinstance(value, list | tuple) or value is None:
        return value
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]


def _described(kind: type[object], name: str) -> str:
    return str(_type_of(kind, name))


def check_range(
    key: str,
    value: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Raise UsageError, by the key's full name, for what is not finite or not within the bounds that are given."""
    if math.isfinite(value) and above < value < below and least <= value <= most:
        return
    bounds = [
        text
        for text, there in (
            (f"above {above:g}", above > -math.inf),
            (f"at least {least:g}", least > -math.inf),
            (f"below {below:g}", below < math.inf),
            (f"at most {most:g}", most < math.inf),
        )
        if there
    ]
    raise UsageError(f"{key}: {value} is out of range", hint=f"Give a number {' and '.join(bounds)}.")
