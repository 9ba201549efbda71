"""Plans that measure a checkpoint exactly as a baseline was measured."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from msn_eval.config.recipes import AugmentedRecipe, Params, read_finetune_recipe, read_linear_recipe
from msn_eval.config.request import AUTO, EvaluationConfig
from msn_eval.config.yaml_config import read_config
from msn_eval.data import DATA_VARIABLE
from msn_eval.errors import ComparisonError, UsageError
from msn_eval.evaluation.plan import Plan, make_plan
from msn_eval.results.baseline import Baseline, BaselineProtocol
from msn_eval.results.comparison import find_nearest_protocol

_SHOWN = 5
_RECIPES = ("linear", "linear-augmented", "finetune")  # probes for which one recipe is one protocol


def make_baseline_plans(baseline: Baseline, config: EvaluationConfig) -> list[Plan]:
    """Return plans whose tasks are the baseline's protocols and draws, and nothing else.

    Protocols with the same manual settings share a plan, so that their features are extracted once.

    Args:
        baseline: The baseline. Everything that is part of a protocol comes from it.
        config: The checkpoint, the data set, and options that change no number.

    Raises:
        ComparisonError: This data set gives a different protocol, or different labelled images; before any network runs.
        MsnEvalError: Whatever `make_plan` raises.
    """
    tests = [entry.title for entry in baseline.protocols if "trained_on" in entry.protocol]
    if tests and not config.test:
        hint = "Give each test set with --test, as the baseline was measured."
        raise ComparisonError(f"the baseline has test sets, and none is given: {'; '.join(tests[:_SHOWN])}", hint=hint)
    by_settings: defaultdict[str, list[BaselineProtocol]] = defaultdict(list)
    for entry in baseline.protocols:
        by_settings[str([entry.protocol.get(name) for name in ("by_hand", "precision", "skipped")])].append(entry)
    return [
        _join_plans([_make_plan(group, config) for group in _group_by_config(entries)], entries)
        for entries in by_settings.values()
    ]


def plan_check(baseline: Baseline, checkpoint: str, given: Mapping[str, object]) -> list[Plan]:
    """Return the plans that measure a checkpoint for `check`.

    Args:
        baseline: The baseline. Its data set is the default where it is embedded.
        checkpoint: The checkpoint.
        given: Options that change no number, by field of `EvaluationConfig`.

    Raises:
        UsageError: No data set is given, or an option is wrong.
        MsnEvalError: Whatever `make_baseline_plans` raises.
    """
    if "data" not in given and not os.environ.get(DATA_VARIABLE):
        if baseline.data != "digits":  # only the user knows where the others are
            hint = f"Pass --data or set ${DATA_VARIABLE}: the baseline's is {baseline.data}."
            raise UsageError("no data set given", hint=hint)
        given = {**given, "data": baseline.data}
    config = read_config(EvaluationConfig, given={**given, "checkpoint": [checkpoint]})
    return make_baseline_plans(baseline, config)


def _group_by_config(entries: Sequence[BaselineProtocol]) -> list[list[BaselineProtocol]]:
    """Group the protocols that one EvaluationConfig can ask for without asking for more: by subset, probe and recipe."""
    groups: defaultdict[tuple[str, str, str], list[BaselineProtocol]] = defaultdict(list)
    for entry in entries:
        probe = entry.protocol["probe"]
        recipe = str(probe["params"]) if probe["name"] in _RECIPES else ""
        groups[entry.protocol["subset"]["name"], probe["name"], recipe].append(entry)
    return list(groups.values())


def _make_plan(entries: Sequence[BaselineProtocol], config: EvaluationConfig) -> Plan:
    protocol = entries[0].protocol
    name = protocol["probe"]["name"]
    params = [cast(Params, entry.protocol["probe"]["params"]) for entry in entries]
    has_tests = any("trained_on" in entry.protocol for entry in entries)
    given = cast(dict[str, Any], protocol["by_hand"]) | _read_recipe(name, params[0])
    return make_plan(
        replace(
            config,
            subset=[protocol["subset"]["name"]],
            probe=[name],
            lambda_=[*map(repr, _list_values(params, "lambda")), *(AUTO for values in params if "auto" in values)],
            k=[int(k) for k in _list_values(params, "k")],
            temperature=_list_values(params, "temperature"),
            precision="fp32" if protocol["precision"] == "exact" else str(entries[0].made_with["precision"]),
            on_bad_image="error" if protocol["skipped"] is None else "skip",
            test=config.test if has_tests else [],
            class_map=config.class_map if has_tests else None,
            **given,
        )
    )


def _read_recipe(probe: str, params: Params) -> dict[str, Any]:
    """Return the options that give a probe the recipe of a protocol."""
    match probe:
        case "linear":
            return {"linear": read_linear_recipe(params)}
        case "linear-augmented":
            fields: dict[str, Any] = dict(params)
            return {"linear_augmented": AugmentedRecipe(**fields | {"lr": [fields["lr"]]})}
        case "finetune":
            return {"finetune": read_finetune_recipe(params), "seed": int(params["seed"])}
        case _:
            return {}


def _list_values(params: Sequence[Params], name: str) -> list[float]:
    return list(dict.fromkeys(float(values[name]) for values in params if name in values))


def _join_plans(plans: Sequence[Plan], entries: Sequence[BaselineProtocol]) -> Plan:
    """Join plans on the same data into one, with the baseline's tasks only."""
    expected = {(entry.protocol_id, draw.draw): draw.split_sha256 for entry in entries for draw in entry.draws}
    offered = [task for plan in plans for task in plan.tasks]
    tasks = [task for task in offered if (task.protocol_id, task.subset.draw) in expected]
    planned = {(task.protocol_id, task.subset.draw): task.split_sha256 for task in tasks}
    problems = []
    for entry in entries:
        if entry.protocol_id not in {task.protocol_id for task in tasks}:
            fields = find_nearest_protocol(entry.protocol, [task.protocol for task in offered])
            problems.append(f"  {entry.title}: this data set gives another protocol: {'; '.join(fields)}")
            continue
        for draw in entry.draws:
            if planned.get((entry.protocol_id, draw.draw)) != draw.split_sha256:
                problems.append(f"  {entry.title}: draw {draw.draw} has other labelled images")
    if problems:
        raise ComparisonError(
            "the baseline's measurements cannot be made here:\n" + "\n".join(problems),
            hint="Give the data set that the baseline was measured on.",
        )
    return replace(
        plans[0],
        subsets=tuple(subset for plan in plans for subset in plan.subsets),
        train_hashes={name: digest for plan in plans for name, digest in plan.train_hashes.items()},
        tasks=tuple(tasks),
    )
