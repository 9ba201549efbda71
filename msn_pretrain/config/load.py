"""Recipe file: a YAML file and `key=value` overrides into a recipe; unknown keys are refused with the nearest known one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from msn_eval.config.reference_yaml import is_reference
from msn_eval.errors import UsageError, nearest
from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe
from msn_pretrain.config.reference_recipe import converted

_Recipe = TypeVar("_Recipe", MSNRecipe, SimSiamRecipe)


@dataclass(frozen=True, kw_only=True)
class _AsTyped:
    """A number of an override, and the text that stood there."""

    value: float
    text: str


def read_recipe(file: Path, *, overrides: Iterable[str] = (), world_size: int = 1) -> MSNRecipe | SimSiamRecipe:
    """Read a recipe from `file`, then `key=value` overrides; `method: simsiam` makes it SimSiam's.

    The YAML of the MSN reference repository is read as it is: see `reference_recipe`, which needs the number of ranks.
    Raises UsageError naming the file and the key for unknown keys, wrong types and values out of range.
    """
    content = _read_yaml(file)
    if is_reference(content):
        content = converted(content, world_size=world_size, where=str(file))
    layers = [(str(file), content)] + [(f"override {text!r}", _read_override(text)) for text in overrides]
    method = next((layer["method"] for _, layer in reversed(layers) if "method" in layer), "msn")
    if method not in ("msn", "simsiam"):
        raise UsageError(
            f"method {method!r}.{nearest(str(method), ('msn', 'simsiam'))}",
            where=str(file),
            remedy="Known: msn, simsiam.",
        )
    return _built(MSNRecipe, layers) if method == "msn" else _built(SimSiamRecipe, layers)


def recipe_as_yaml(recipe: MSNRecipe | SimSiamRecipe) -> str:
    """Give the whole recipe as YAML, which `read_recipe` reads back to an equal one."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def _built(kind: type[_Recipe], layers: Iterable[tuple[str, Mapping[str, object]]]) -> _Recipe:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config: Any = OmegaConf.structured(kind)
    for part in (config, *(section for section in config.values() if OmegaConf.is_config(section))):
        OmegaConf.set_readonly(part, False)  # they inherit that from frozen dataclasses
    for where, layer in layers:
        for key, value in _leaves(kind, layer, where):
            try:
                OmegaConf.update(config, key, value, force_add=False)
            except OmegaConfBaseException as error:
                reason = str(error).partition("\n")[0]
                raise UsageError(f"{key}: {reason}", where=where, remedy="Correct the value.") from error
        try:
            recipe = cast(_Recipe, OmegaConf.to_object(config))
        except UsageError as error:
            raise UsageError(error.what, where=where, remedy=error.remedy) from None
    return recipe


def _leaves(
    kind: type[object], layer: Mapping[str, object], where: str, prefix: str = ""
) -> Iterable[tuple[str, object]]:
    """Give `section.key` and value for each of a layer, refusing what the records do not know."""
    types = get_type_hints(kind)
    names = [one.name for one in fields(cast(Any, kind))]
    for key, value in layer.items():
        if key not in names:
            known = _all_keys(kind, prefix)
            namesakes = [one for one in known if one.endswith(f".{key}")]
            close = nearest(namesakes[0] if namesakes else f"{prefix}{key}", known)
            raise UsageError(
                f"unknown key {prefix + key!r}.{close}", where=where, remedy=f"Known here: {', '.join(names)}."
            )
        inner = types[key]
        if is_dataclass(inner):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{prefix}{key} is a section, not a value", where=where, remedy=f"Write {key}: and keys below."
                )
            yield from _leaves(cast(type[object], inner), value, where, f"{prefix}{key}.")
        elif inner is str and isinstance(value, _AsTyped):
            yield f"{prefix}{key}", value.text  # YAML would make 7 of a folder called 007
        else:
            yield f"{prefix}{key}", value.value if isinstance(value, _AsTyped) else value


def _all_keys(kind: type[object], prefix: str) -> list[str]:
    types = get_type_hints(kind)
    keys = []
    for one in fields(cast(Any, kind)):
        inner = types[one.name]
        keys.append(f"{prefix}{one.name}")
        if is_dataclass(inner):
            keys += _all_keys(cast(type[object], inner), f"{prefix}{one.name}.")
    return keys


def _read_yaml(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except FileNotFoundError:
        raise UsageError("no such recipe", where=str(file), remedy="configs/pretrain/ has those that ship.") from None
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UsageError(f"cannot be read as YAML: {reason}", where=str(file), remedy="Correct the file.") from error
    if not isinstance(content, dict):
        raise UsageError("is no mapping of keys to values", where=str(file), remedy="Write `key: value` lines.")
    return {str(key): value for key, value in content.items()}


def _read_override(text: str) -> dict[str, Any]:
    """Read `section.key=value` into nested mappings."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UsageError(f"{text!r} is not of the form key=value", remedy="Write for example optimization.epochs=10.")
    try:
        read: Any = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False))[
            "value"
        ]
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UsageError(f"{text!r}: the value is no YAML", remedy="Quote it for the shell.") from error
    if isinstance(read, int | float) and not isinstance(read, bool):
        read = _AsTyped(value=read, text=value.strip())
    for part in reversed(key.split(".")):
        read = {part: read}
    return cast(dict[str, Any], read)
