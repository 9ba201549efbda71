"""Config: a YAML file, options and `key=value` overrides into a frozen dataclass; unknown keys are refused."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

from msn_eval.errors import UsageError, nearest

_Record = TypeVar("_Record")


def read_config(
    kind: type[_Record],
    *,
    file: Path | None = None,
    given: Mapping[str, object] | None = None,
    overrides: Iterable[str] = (),
) -> _Record:
    """Build a `kind` from its defaults, then `file`, then `given`, then `overrides`, the last one winning.

    file:      YAML with the fields' names; `-` stands for `_`; a field that is a record is a section with its own
    overrides: `key=value`, the value in YAML; `section.key=value` for a record's field
    Raises UsageError naming the file and the key for unknown keys and values of the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException, ValidationError

    layers: list[tuple[str, Mapping[str, object]]] = []
    if file is not None:
        layers.append((str(file), _read_yaml(file)))
    layers.append(("options", given or {}))
    layers += [(f"override {text!r}", _read_override(kind, text)) for text in overrides]
    config: Any = OmegaConf.structured(kind)
    for part in (config, *(section for section in config.values() if OmegaConf.is_dict(section))):
        OmegaConf.set_readonly(part, False)  # they inherit that from frozen dataclasses
    for where, layer in layers:
        for owner, path, value in _settings(kind, layer, where):
            name = path[-1]
            try:
                OmegaConf.update(config, ".".join(path), _as_field(owner, name, value))
                settled: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
                for part in path:
                    settled = settled[part]
                if isinstance(settled, list) and any(isinstance(part, list | dict) for part in settled):
                    raise ValidationError("a list or mapping inside the list")
            except OmegaConfBaseException as error:
                reason = str(error).partition("\n")[0]
                shown = ".".join(part.rstrip("_") for part in path)
                raise UsageError(
                    f"{shown}: {reason}", where=where, remedy=f"It takes: {_described(owner, name)}."
                ) from error
    return cast(_Record, OmegaConf.to_object(config))


def _settings(
    kind: type[object], layer: Mapping[str, object], where: str
) -> Iterator[tuple[type[object], tuple[str, ...], object]]:
    """Give every value of a layer with its place, and the record that it is a field of."""
    for key, value in layer.items():
        first, dot, rest = key.partition(".")
        section = _section(kind, _field_name(kind, first, where)) if dot or isinstance(value, Mapping) else None
        if section is None:
            yield kind, (_field_name(kind, key, where),), value
            continue
        name = _field_name(kind, first, where)
        content = {rest: value} if dot else {str(one): inner for one, inner in cast(Any, value).items()}
        for owner, path, inner in _settings(section, content, where):
            yield owner, (name, *path), inner


def _section(kind: type[object], name: str) -> type[object] | None:
    """Give the record that a field holds, None where it holds none."""
    assert is_dataclass(kind)
    held = next(one.type for one in fields(kind) if one.name == name)
    return held if isinstance(held, type) and is_dataclass(held) else None


def _read_yaml(file: Path) -> dict[str, object]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except FileNotFoundError:
        raise UsageError("no such config file", where=str(file), remedy="Give the path of a YAML file.") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        endless = isinstance(error, RecursionError)
        reason = "it refers to itself, or is nested too deeply" if endless else " ".join(str(error).split())
        raise UsageError(f"cannot be read as YAML: {reason}", where=str(file), remedy="Correct the file.") from error
    if not isinstance(content, dict):
        raise UsageError("is no mapping of keys to values", where=str(file), remedy="Write `key: value` lines.")
    return {str(key): value for key, value in content.items()}


def _read_override(kind: type[object], text: str) -> dict[str, object]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"{text!r} is not of the form key=value", remedy="Write for example limit=10.")
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UsageError(f"{text!r}: the value is no YAML", remedy="Quote it for the shell.") from error
    read = content["value"]
    if isinstance(read, int | float) and _is_text(kind, key, f"override {text!r}"):
        return {key: value.strip()}  # as its option gives it: YAML would make 7 of a folder called 007
    return {key: read}


def _is_text(kind: type[object], key: str, where: str) -> bool:
    ((owner, path, _),) = _settings(kind, {key: 0}, where)
    assert is_dataclass(owner)
    return any(one.name == path[-1] and one.type in (str, str | None) for one in fields(owner))


def _field_name(kind: type[object], key: str, where: str) -> str:
    assert is_dataclass(kind)
    names = {one.name.rstrip("_"): one.name for one in fields(kind)}
    normal = key.replace("-", "_").rstrip("_")
    if normal not in names:
        raise UsageError(
            f"unknown key {key!r}.{nearest(normal, names)}", where=where, remedy=f"Known: {', '.join(names)}."
        )
    return names[normal]


def _as_field(kind: type[object], name: str, value: object) -> object:
    """Let a list field take `a,b` or a single value, as its option does."""
    assert is_dataclass(kind)
    types = {one.name: one.type for one in fields(kind)}
    if get_origin(types[name]) is not list or isinstance(value, list | tuple) or value is None:
        return value
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]


def _described(kind: type[object], name: str) -> str:
    assert is_dataclass(kind)
    return next(str(one.type) for one in fields(kind) if one.name == name)
