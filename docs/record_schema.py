"""Write docs/reference/record.schema.json, the JSON Schema of a result record, from the dataclasses that read and write records.

python docs/record_schema.py
"""

import json
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from msn_eval.results.record import SCHEMA, Result

PATH = Path(__file__).parent / "reference" / "record.schema.json"
_TYPES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}


def make_schema() -> dict[str, Any]:
    """Return the JSON Schema of a record of the current schema."""
    record = _describe(Result)
    properties = {"schema": {"const": SCHEMA}, **record["properties"], "seal": {"type": "string"}}
    properties["status"] = {"enum": ["ok", "not_converged", "failed"]}  # `damaged` stands in no file
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A result record of msn-eval, schema {SCHEMA}",
        **record,
        "properties": properties,
        "required": ["schema", *record["required"], "seal"],
    }


def _describe(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        texts = _read_attributes(hint.__doc__ or "")
        hints = get_type_hints(hint)
        properties = {name: _describe(kind) | texts.get(name, {}) for name, kind in hints.items()}
        required = [field.name for field in fields(hint) if field.default is MISSING]
        # `type[Any]` and instances are dataclasses too; a record is always a class here.
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if origin in (Union, UnionType):
        options = [_describe(option) for option in arguments]
        plain = [option["type"] for option in options if option.keys() == {"type"}]
        return {"type": plain} if len(plain) == len(options) else {"anyOf": options}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        length = {} if Ellipsis in arguments else {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "items": _describe(arguments[0]), **length}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    values = {} if arguments[-1] is object else {"additionalProperties": _describe(arguments[-1])}
    return {"type": "object", **values}


def _read_attributes(docstring: str) -> dict[str, dict[str, str]]:
    """Return the descriptions of the section `Attributes`, by attribute."""
    section = docstring.partition("Attributes:\n")[2]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: {"description": " ".join(text.split())} for name, text in found}


if __name__ == "__main__":
    PATH.write_text(json.dumps(make_schema(), indent=1) + "\n", encoding="utf-8")
