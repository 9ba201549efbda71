"""Wherein two protocols differ, field by field."""

from collections.abc import Mapping, Sequence

_HASH_DIGITS, _SHOWN_DIGITS = 64, 12


def protocol_differences(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    """Say field by field wherein two nested mappings differ: `limit: None -> 5`."""
    one, other = dict(_leaves(first)), dict(_leaves(second))
    keys = [*one, *(key for key in other if key not in one)]
    differing = (key for key in keys if key not in one or key not in other or one[key] != other[key])
    return [f"{key}: {_shown(one, key)} -> {_shown(other, key)}" for key in differing]


def nearest_protocol(wanted: Mapping[str, object], others: Sequence[Mapping[str, object]]) -> list[str]:
    """Give the differences of the protocol that has the fewest; none where there is no other."""
    found = [protocol_differences(wanted, other) for other in others]
    fewest = min((len(fields) for fields in found), default=0)
    return next((fields for fields in found if len(fields) == fewest), [])


def _leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}.{key}" if path else str(key))]


def _shown(leaves: Mapping[str, object], key: str) -> str:
    if key not in leaves:
        return "(none)"
    value = leaves[key]
    return value[:_SHOWN_DIGITS] if isinstance(value, str) and len(value) == _HASH_DIGITS else str(value)
