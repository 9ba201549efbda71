"""docs/reference/record.schema.json: the JSON Schema of the records that msn-eval writes and reads."""

import json
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest

_ROOT = Path(__file__).parents[1]
_SCHEMA = json.loads((_ROOT / "docs" / "reference" / "record.schema.json").read_text(encoding="utf-8"))
_RECORDS = sorted((_ROOT / "tests" / "golden" / "records" / "schema-2").glob("*.json"))


def _read_record(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_schema_is_that_of_the_dataclasses() -> None:
    program = runpy.run_path(str(_ROOT / "docs" / "record_schema.py"))

    assert program["make_schema"]() == _SCHEMA, "run: python docs/record_schema.py"


@pytest.mark.parametrize("path", _RECORDS, ids=lambda path: path.stem)
def test_golden_record_fits_the_schema(path: Path) -> None:
    jsonschema.validate(_read_record(path), _SCHEMA, cls=jsonschema.Draft202012Validator)


def test_written_record_fits_the_schema(digits_runs: Path) -> None:
    for path in digits_runs.glob("*.json"):
        jsonschema.validate(_read_record(path), _SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("field", "value"), [("status", "damaged"), ("schema", 1), ("metrics", 0.5), ("unknown", 1)], ids=str
)
def test_record_with_a_wrong_field_does_not_fit(field: str, value: object) -> None:
    record = _read_record(_RECORDS[0]) | {field: value}

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, _SCHEMA, cls=jsonschema.Draft202012Validator)
