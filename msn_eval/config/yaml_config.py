"""Config: a YAML file, options and `key=value` overrides become a frozen dataclass; unknown keys are refused."""

import io
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from msn_eval.errors import UsageError, did_you_mean, suggest_paths
from msn_eval.files.regular import read_regular_file

_MOST_BYTES = 100_000
_DEEPEST = 20
_UNUSABLE = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # NUL, and surrogates that are no byte of a file name
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class TypedNumber:
    """A number of an override, and the text that the user typed: YAML makes 7 of a folder called 007."""

    value: float
    text: str


def read_config(
    kind: type[_Record],
    *,
    file: Path | None = None,
    given: Mapping[str, object] | None = None,
    overrides: Iterable[str] = (),
    translate: Callable[[Mapping[str, object], str], Mapping[str, object]] | None = None,
) -> _Record:
    """Build a `kind` from its defaults, then `file`, then `given`, then `overrides`; the last one wins.

    Args:
        kind: A frozen dataclass. Fields that are dataclasses are sections.
        file: YAML with the fields' names; `-` and `_` are equal.
        given: Values by field name.
        overrides: `key=value` or `section.key=value`, the value in YAML.
        translate: Maps the content and path of a file of another program to the fields of `kind`.

    Raises:
        UsageError: A key is unknown or a value has the wrong type. The text names the file and the key.
    """
    layers: list[tuple[str, Mapping[str, object]]] = []
    if file is not None:
        content = read_yaml(file)
        layers.append((str(file), content if translate is None else translate(content, str(file))))
    layers.append(("options", given or {}))
    layers += [(f"override {text!r}", parse_override(text)) for text in overrides]
    return build_config(kind, layers)


def build_config(kind: type[_Record], layers: Iterable[tuple[str, Mapping[str, object]]]) -> _Record:
    """Build a `kind` from its defaults and layers of values, the last one winning.

    Args:
        kind: A frozen dataclass. Fields that are dataclasses are sections.
        layers: Where the values are from, for errors, and the values by `key` or `section.key`.

    Raises:
        UsageError: A key is unknown or a value has the wrong type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config: Any = OmegaConf.structured(kind)
    for node in (config, *(section for section in config.values() if OmegaConf.is_config(section))):
        OmegaConf.set_readonly(node, False)  # they inherit it from frozen dataclasses
    for where, layer in layers:
        for key, wanted, value in _iterate_fields(_list_fields(kind), layer, where):
            # OmegaConf takes these for a reference and for a value that is still missing.
            if "${" in str(value) or "???" in str(value):
                hint = "References such as ${…} are not supported: write the value itself."
                raise UsageError(f"{key.rstrip('_')}: {value!r} is not a value", where=where, hint=hint)
            if _UNUSABLE.search(str(value)):
                hint = "Write it without characters that no file name can have."
                raise UsageError(
                    f"{key.rstrip('_')}: {value!r} holds a character without a meaning", where=where, hint=hint
                )
            try:
                OmegaConf.update(config, key, _convert_value(wanted, value))
            except OmegaConfBaseException as error:
                name = key.rstrip("_")
                place = f"--{name.replace('_', '-')}" if where == "options" else f"{where}: {name}"
                text = value.text if isinstance(value, TypedNumber) else value
                given = ",".join(map(str, text)) if isinstance(text, list | tuple) else text
                raise UsageError(
                    f"cannot be {str(given)!r}", where=place, hint=f"Give {_describe_kind(wanted)}."
                ) from error
    return cast(_Record, OmegaConf.to_object(config))


def read_yaml(file: Path, *, what: str = "config file", hint: str = "Give the path of a YAML file.") -> dict[str, Any]:
    """Read a YAML file that maps keys to values. Aliases (`*name`) and references (`${…}`) are refused.

    Args:
        file: The file.
        what: What it is, for the error where it is missing.
        hint: For the same error.

    Raises:
        UsageError: It is missing, too large, not a regular file, not valid YAML, or not a mapping.
    """
    try:
        content = _parse_yaml(read_regular_file(file, most_bytes=_MOST_BYTES))
    except FileNotFoundError:
        suggestion = suggest_paths(str(file))
        what = f"no such {what}.{suggestion}" if suggestion else f"no such {what}"
        raise UsageError(what, where=str(file), hint=hint) from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=str(file), hint=hint) from error
    except ValueError as error:
        raise UsageError(f"cannot be read as YAML: {error}", where=str(file), hint="Correct the file.") from error
    if not isinstance(content, dict):
        raise UsageError("is not a mapping of keys to values", where=str(file), hint="Write `key: value` lines.")
    return {str(key): value for key, value in content.items()}


def _parse_yaml(text: bytes) -> Any:
    """Parse YAML without aliases, of which a few expand to gigabytes, and without references to the environment.

    Raises:
        ValueError: It is not valid, or it holds one of these.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def line_of(event: yaml.Event) -> str:
        return f"line {event.start_mark.line + 1}: " if event.start_mark is not None else ""

    depth = 0
    try:
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep")
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError(f"{line_of(event)}aliases (*name) are not supported; write the value itself")
            if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
                what = f"{event.value!r} is not a value; references (${{…}}) are not supported"
                raise yaml.YAMLError(f"{line_of(event)}{what}")
        return OmegaConf.to_container(OmegaConf.load(io.BytesIO(text)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def parse_override(text: str, *, example: str = "limit=10") -> dict[str, Any]:
    """Parse `key=value`, the value in YAML; a number is returned as a `TypedNumber`.

    Args:
        text: The override.
        example: One that is valid, for the error.

    Raises:
        UsageError: It has another form.
    """
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"{text!r} is not of the form key=value", hint=f"Write for example {example}.")
    try:
        content = _parse_yaml(os.fsencode(f"value: {value}"))
    except ValueError as error:
        what = f"{text[:80]!r}: the value is not valid YAML: {error}"
        raise UsageError(what, hint="Quote it for YAML and for the shell.") from error
    parsed = content["value"]
    return {key: TypedNumber(parsed, value.strip()) if isinstance(parsed, int | float) else parsed}


def _list_fields(kind: Any) -> dict[str, tuple[str, Any]]:
    """Return the path and type of each field by its `key` or `section.key`; `lambda` is the key of a field `lambda_`."""
    listed: dict[str, tuple[str, Any]] = {}
    for field in fields(kind):
        key = field.name.rstrip("_")
        listed[key] = field.name, field.type
        if is_dataclass(field.type):
            listed |= {
                f"{key}.{name}": (f"{field.name}.{path}", inner)
                for name, (path, inner) in _list_fields(field.type).items()
            }
    return listed


def _iterate_fields(
    known: Mapping[str, tuple[str, Any]], layer: Mapping[str, object], where: str
) -> Iterator[tuple[str, Any, object]]:
    """Yield path, type and value of each field in a layer, sections field by field."""
    for given, value in layer.items():
        key = given.replace("-", "_").rstrip("_")
        if key not in known:
            section = key.rpartition(".")[0] if key.rpartition(".")[0] in known else ""
            siblings = [name for name in known if name.rpartition(".")[0] == section]
            namesake = next((name for name in known if name.endswith(f".{key}")), key)
            hint = f"Known{f' in {section}' if section else ''}: {', '.join(siblings)}."
            raise UsageError(f"unknown key {given!r}.{did_you_mean(namesake, known)}", where=where, hint=hint)
        path, wanted = known[key]
        if not (isinstance(wanted, type) and is_dataclass(wanted)):
            yield path, wanted, value
            continue
        entries = asdict(value) if isinstance(value, wanted) else value
        if not isinstance(entries, Mapping):
            hint = f"Write {key}.KEY=VALUE, or keys below {key}:."
            raise UsageError(f"{key} is a section, not a value", where=where, hint=hint)
        yield from _iterate_fields(known, {f"{key}.{name}": entry for name, entry in entries.items()}, where)


def _describe_kind(wanted: Any) -> str:
    """Describe the values of a field in the user's words."""
    kinds = {wanted, *get_args(wanted)}
    kinds |= {part for kind in kinds for part in get_args(kind)}
    is_list = any(get_origin(kind) is list for kind in kinds)
    words = {bool: ("true or false", ""), int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}
    one, several = next((words[kind] for kind in words if kind in kinds), ("text", "names"))
    return f"{several}, separated by commas" if is_list else one


def _convert_value(wanted: Any, value: object) -> object:
    """Let a list field take `a,b` or a single value as its option does, and a text field a number as typed."""
    from omegaconf.errors import ValidationError

    if isinstance(value, TypedNumber):
        value = value.text if wanted in (str, str | None) else value.value
    lists = [kind for kind in (wanted, *get_args(wanted)) if get_origin(kind) is list]  # the field may also be optional
    if not lists or value is None:
        return value
    if isinstance(value, str):
        # An architecture's keyword may be a tuple.
        return [item.strip() for item in re.split(r",(?![^(]*\))", value)]
    if not isinstance(value, list | tuple):
        return value if isinstance(value, Mapping) else [value]
    if any(isinstance(item, list | Mapping) for item in value):
        raise ValidationError("a list or mapping inside the list")
    return list(value)


def check_range(
    key: str,
    value: float,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Raise UsageError for a value of an option or a config key that is not finite or not within the given bounds."""
    if above < value < below and least <= value <= most:  # false for NaN; exact for whole numbers beyond floats
        return
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    texts = [
        f"{name} {bound if isinstance(bound, int) else f'{bound:g}'}"
        for name, bound in bounds.items()
        if math.isfinite(bound)
    ]
    what = f"{key} {value}: out of range" if key.startswith("--") else f"{key}: {value} is out of range"
    raise UsageError(what, hint=f"Give a number {' and '.join(texts)}.")


def check_ranges(record: object, section: str, names: str, **bounds: float) -> None:
    """Call `check_range` for the named fields of a record; lists item by item, None never.

    The section `--` is that of options.
    """
    for name in names.split():
        value = getattr(record, name)
        key = f"--{name.replace('_', '-')}" if section == "--" else f"{section}.{name}"
        for number in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            check_range(key, number, **bounds)


def check_choice(option: str, value: str, known: Collection[str]) -> None:
    """Raise UsageError for an unknown value of an option (`--tap`) or a config key (`linear.taps`).

    Args:
        option: The option or key, as the user types it.
        value: Its value.
        known: The allowed values.
    """
    if value not in known:
        what = f"{option}: cannot be {value!r}.{did_you_mean(value, known)}"
        raise UsageError(what, hint=f"Allowed: {', '.join(known)}.")
