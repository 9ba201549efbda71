"""The plans that measure another checkpoint exactly as a baseline was measured."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from msn_eval.config.recipes import AugmentedRecipe, Finetune, Params, linear_recipe_of, recipe_of
from msn_eval.config.request import AUTO, EvaluationConfig
from msn_eval.errors import ComparisonError
from msn_eval.evaluation.plan import Plan, make_plan
from msn_eval.results.baseline import Baseline, BaselineProtocol
from msn_eval.results.comparison import nearest_protocol


def make_baseline_plans(baseline: Baseline, request: EvaluationConfig) -> list[Plan]:
    """Give plans whose tasks are the baseline's protocols and draws, and nothing else.

    request: the checkpoint, the data set, and what changes no number; whatever is part of a protocol is the baseline's
    Protocols that share what is set by hand share a plan, so that their features are extracted once.
    Raises ComparisonError, before any network runs, for a protocol that this data set does not give (other images, other
    labelled images, another version of the package), and whatever make_plan raises.
    """
    shared: defaultdict[str, list[BaselineProtocol]] = defaultdict(list)
    for entry in baseline.protocols:
        shared[str([entry.protocol.get(name) for name in ("by_hand", "precision", "skipped")])].append(entry)
    return [_joined([_plan(one, request) for one in _alike(entries)], entries) for entries in shared.values()]


def _alike(entries: Sequence[BaselineProtocol]) -> Iterable[list[BaselineProtocol]]:
    """Give the protocols by subset and probe, and by a recipe where that is one protocol by itself: only these can be asked
    for in one request without asking for more."""
    found: defaultdict[tuple[str, str, str], list[BaselineProtocol]] = defaultdict(list)
    for entry in entries:
        probe = entry.protocol["probe"]
        recipe = str(probe["params"]) if probe["name"] in ("linear", "linear-augmented", Finetune.name) else ""
        found[entry.protocol["subset"]["name"], probe["name"], recipe].append(entry)
    return found.values()


def _plan(entries: Sequence[BaselineProtocol], request: EvaluationConfig) -> Plan:
    protocol = entries[0].protocol
    name = protocol["probe"]["name"]
    params = [cast(Params, entry.protocol["probe"]["params"]) for entry in entries]
    by_hand = cast(dict[str, Any], protocol["by_hand"])
    given = {**by_hand, **_finetuning(params[0])} if name == Finetune.name else by_hand
    precision = "fp32" if protocol["precision"] == "exact" else str(entries[0].made_with["precision"])
    return make_plan(
        replace(
            request,
            subset=[protocol["subset"]["name"]],
            probe=[name],
            lambda_=[*map(repr, _values(params, "lambda")), *([AUTO] if any("auto" in one for one in params) else [])],
            k=[int(k) for k in _values(params, "k")],
            temperature=_values(params, "temperature"),
            linear=linear_recipe_of(params[0]) if name == "linear" else request.linear,
            linear_augmented=_augmented(params[0]) if name == "linear-augmented" else request.linear_augmented,
            precision=precision,
            on_bad_image="error" if protocol["skipped"] is None else "skip",
            **given,
        )
    )


def _finetuning(params: Params) -> dict[str, Any]:
    return {"finetune": recipe_of(params), "seed": int(params["seed"])}


def _augmented(params: Params) -> AugmentedRecipe:
    others: dict[str, Any] = {name: value for name, value in params.items() if name != "lr"}
    return AugmentedRecipe(lr=[float(params["lr"])], **others)


def _values(params: Sequence[Params], name: str) -> list[float]:
    return list(dict.fromkeys(float(one[name]) for one in params if name in one))


def _joined(plans: Sequence[Plan], entries: Sequence[BaselineProtocol]) -> Plan:
    """Put plans on the same data into one, with the tasks of the baseline alone."""
    wanted = {(entry.protocol_id, draw.draw): draw.split_sha256 for entry in entries for draw in entry.draws}
    offered = [task for plan in plans for task in plan.tasks]
    tasks = [task for task in offered if (task.protocol_id, task.subset.draw) in wanted]
    planned = {(task.protocol_id, task.subset.draw): task.split_sha256 for task in tasks}
    problems = []
    for entry in entries:
        if entry.protocol_id not in {task.protocol_id for task in tasks}:
            fields = nearest_protocol(entry.protocol, [task.protocol for task in offered])
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
