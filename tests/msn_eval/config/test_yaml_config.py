import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from msn_eval.config.request import EvaluationConfig
from msn_eval.config.yaml_config import read_config
from msn_eval.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A small record of every kind of field."""

    name: str = "default"
    learning_rate: float = 0.1
    lambda_: list[float] = field(default_factory=list)
    steps: int = 100
    limit: int | None = None
    shuffle: bool = False
    tags: list[str] = field(default_factory=lambda: ["a", "b"])


BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 10)
)


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_those_of_the_record() -> None:
    assert read_config(Recipe) == Recipe()


@pytest.mark.parametrize(
    ("text", "given", "overrides", "expected"),
    [
        ("steps: 7\ntags: [x]\n", {}, [], Recipe(steps=7, tags=["x"])),
        ("steps: 7\nname: file\n", {"steps": 8}, [], Recipe(steps=8, name="file")),
        ("steps: 7\n", {"steps": 8}, ["steps=9", "steps=10"], Recipe(steps=10)),
        ("steps: 7\n", {"limit": 5}, ["limit="], Recipe(steps=7)),
        ("tags: [x, y, z]\n", {}, ["tags=[q]"], Recipe(tags=["q"])),
        ("# only a comment\n", {}, [], Recipe()),
    ],
)
def test_later_layers_win(
    tmp_path: Path, text: str, given: dict[str, object], overrides: list[str], expected: Recipe
) -> None:
    assert read_config(Recipe, file=write_yaml(tmp_path, text), given=given, overrides=overrides) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learning_rate=1e-3", Recipe(learning_rate=0.001)),
        ("learning-rate=1E-3", Recipe(learning_rate=0.001)),
        ("lambda=1e-3,2.5", Recipe(lambda_=[0.001, 2.5])),
        ("lambda=1e-3, 2.5", Recipe(lambda_=[0.001, 2.5])),
        ("lambda=[1e-3, 2.5]", Recipe(lambda_=[0.001, 2.5])),
        ("lambda=2.5", Recipe(lambda_=[2.5])),
        ("tags=only", Recipe(tags=["only"])),
        ("name=random:vit?img_size=32", Recipe(name="random:vit?img_size=32")),
        ("name=007", Recipe(name="007")),
        ("name=on", Recipe(name="on")),
        ("name=1e3", Recipe(name="1e3")),
    ],
)
def test_override_is_converted_to_the_type_of_its_field(override: str, expected: Recipe) -> None:
    assert read_config(Recipe, overrides=[override]) == expected


@pytest.mark.parametrize("text", ["learning_rate: 1e-3", "learning-rate: 0.001"])
def test_file_may_use_dashes_and_exponents(tmp_path: Path, text: str) -> None:
    assert read_config(Recipe, file=write_yaml(tmp_path, text)).learning_rate == 0.001


def test_options_give_lists_as_they_are() -> None:
    assert read_config(Recipe, given={"tags": ["a,b", "c"]}).tags == ["a,b", "c"]


def test_unknown_key_of_a_file_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "learning_rat: 0.5\n")
    with pytest.raises(UsageError) as caught:
        read_config(Recipe, file=file)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(
        f"{file}: unknown key 'learning_rat'. Did you mean learning_rate?\nKnown: name, "
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"overrides": ["stepz=3"]}, r"override 'stepz=3': unknown key 'stepz'\. Did you mean steps\?"),
        ({"given": {"colour": "red"}}, "options: unknown key 'colour'"),
    ],
)
def test_unknown_key_names_its_layer(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_config(Recipe, **layers)


@pytest.mark.parametrize("key", ["steps.more", "tags[0]", "_target_"])
def test_paths_into_fields_are_unknown_keys(key: str) -> None:
    with pytest.raises(UsageError, match="unknown key"):
        read_config(Recipe, overrides=[f"{key}=1"])


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", "many", "a whole number"),
        ("steps", "1.5", "a whole number"),
        ("steps", "true", "a whole number"),
        ("steps", "null", "a whole number"),
        ("learning_rate", "fast", "a number"),
        ("shuffle", "maybe", "true or false"),
        ("lambda", "1,x", "numbers, separated by commas"),
        ("lambda", "{a: 1}", "numbers, separated by commas"),
        ("lambda", "[1, [2]]", "numbers, separated by commas"),
        ("name", "[1, 2]", "text"),
        ("tags", "null", "names, separated by commas"),
    ],
)
def test_value_of_the_wrong_type_names_file_key_and_type(tmp_path: Path, key: str, value: str, wanted: str) -> None:
    file = write_yaml(tmp_path, f"{key}: {value}\n")
    with pytest.raises(UsageError) as caught:
        read_config(Recipe, file=file)
    assert str(caught.value).startswith(f"{file}: {key}: ")
    assert caught.value.hint == f"Give {wanted}."


@pytest.mark.parametrize("value", ["${name}", "${oc.env:HOME}", "a${b}", "???"])
def test_reference_is_refused_with_its_key(tmp_path: Path, value: str) -> None:
    """OmegaConf takes these for references and for a value that is still missing."""
    file = write_yaml(tmp_path, f'name: "{value}"\n')
    for layers in ({"given": {"name": value}}, {"overrides": [f'name="{value}"']}, {"file": file}):
        with pytest.raises(UsageError, match=r"(name|line 1|override 'name=.*'): .* is not a value"):
            read_config(Recipe, **layers)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"steps: [", "cannot be read as YAML", id="broken"),
        pytest.param(b"steps: 1\nsteps: 2\n", "found duplicate key steps", id="key twice"),
        pytest.param(b"\xff", "cannot be read as YAML", id="no UTF-8"),
        pytest.param(b"- steps\n", "is not a mapping of keys to values", id="list"),
        pytest.param(b"steps: 1\n---\nsteps: 2\n", "cannot be read as YAML", id="two documents"),
        pytest.param(b"tags: &x [*x]\n", "aliases (*name) are not supported", id="alias of itself"),
        pytest.param(BOMB, "aliases (*name) are not supported", id="aliases that expand to gigabytes"),
        pytest.param(b"[" * 5000, "nested more than 20 levels", id="nested too deeply"),
        pytest.param(b"steps: " + b"1" * 5000, "4300 digits", id="number of too many digits"),
    ],
)
def test_file_that_is_not_a_mapping_is_a_usage_error_that_names_it(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_config(Recipe, file=file)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{file}: ")
    assert reason in str(caught.value)


def test_missing_file_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: no such config file"):
        read_config(Recipe, file=tmp_path / "nowhere.yaml")


def test_folder_in_the_place_of_a_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: "):
        read_config(Recipe, file=tmp_path)


def test_pipe_device_and_huge_file_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "huge.yaml").touch()
    os.truncate(tmp_path / "huge.yaml", 2**40)

    for file in (tmp_path / "pipe.yaml", Path("/dev/zero"), tmp_path / "huge.yaml"):
        with pytest.raises(UsageError, match=r"cannot be read: it is (a pipe, device or socket|larger than)"):
            read_config(Recipe, file=file)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        pytest.param(f"[{BOMB.decode().replace(': ', ', ').replace(chr(10), ', ')}]", "aliases", id="aliases"),
        pytest.param("[" * 5000 + "]" * 5000, "nested more than", id="nested too deeply"),
        pytest.param("1" * 5000, "4300 digits", id="number of too many digits"),
    ],
)
def test_override_that_would_grow_is_refused(value: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_config(Recipe, overrides=[f"steps={value}"])


@pytest.mark.parametrize("value", ["a\0b", "a\ud800b"])
def test_text_that_no_file_name_can_hold_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match=r"name: .* holds a character"):
        read_config(Recipe, given={"name": value})


def test_tags_of_a_file_run_nothing(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, f"name: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(UsageError, match="could not determine a constructor"):
        read_config(Recipe, file=file)
    assert os.listdir(tmp_path) == ["recipe.yaml"]  # noqa: PTH208 - names are enough


@pytest.mark.parametrize("text", ["steps", "=3", ""])
def test_override_without_key_or_value_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="is not of the form key=value"):
        read_config(Recipe, overrides=[text])


@pytest.mark.parametrize("text", ["name=a: b", "tags=[a", "name=!!python/object/apply:os.getcwd []"])
def test_override_that_is_not_yaml_is_a_usage_error_that_shows_it(text: str) -> None:
    with pytest.raises(UsageError, match="the value is not valid YAML") as caught:
        read_config(Recipe, overrides=[text])
    assert text in str(caught.value)


def test_checks_of_the_record_itself_reach_the_user() -> None:
    with pytest.raises(UsageError, match="--temperature nan: out of range"):
        read_config(EvaluationConfig, overrides=["temperature=.nan"])


def test_count_or_auto_may_be_written_as_a_number(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "batch-size: 64\nworkers: auto\n")
    config = read_config(EvaluationConfig, file=file)
    assert (config.batch_images, config.worker_count) == (64, None)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    width: int = 4
    name: str = "flat"


@dataclass(frozen=True, kw_only=True)
class _Config:
    layer: _Layer = field(default_factory=_Layer)
    steps: int = 1


@pytest.mark.parametrize(
    "layers",
    [
        {"overrides": ["layer.width=8"]},
        {"overrides": ["layer={width: 8}"]},
        {"given": {"layer": {"width": 8}}},
        {"given": {"layer.width": 8}},
        {"given": {"layer": _Layer(width=8)}},
    ],
    ids=str,
)
def test_section_is_filled_key_by_key(layers: dict[str, Any]) -> None:
    assert read_config(_Config, **layers) == _Config(layer=_Layer(width=8))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "layer.widht=8",
            "override 'layer.widht=8': unknown key 'layer.widht'. Did you mean layer.width?\nKnown in layer: ",
        ),
        ("width=8", "override 'width=8': unknown key 'width'. Did you mean layer.width?\nKnown: layer, steps."),
        ("layer=8", "override 'layer=8': layer is a section, not a value\nWrite layer.KEY=VALUE"),
        ("layer.width=wide", "override 'layer.width=wide': layer.width: cannot be 'wide'"),
        ("steps.width=8", "override 'steps.width=8': unknown key 'steps.width'."),
    ],
)
def test_mistake_in_a_section_names_the_section(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_config(_Config, overrides=[override])

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", [(1, 2), [1, 2], "1,2"], ids=str)
def test_list_may_be_a_tuple_a_list_or_a_text(value: object) -> None:
    assert read_config(EvaluationConfig, given={"k": value}).k == [1, 2]


def test_comma_in_brackets_separates_no_items() -> None:
    config = read_config(EvaluationConfig, given={"arch": "vit?img_size=(32,32),resnet50?stem=cifar"})
    assert config.arch == ["vit?img_size=(32,32)", "resnet50?stem=cifar"]
