"""`--lambda auto` from the request to reports: a protocol of its own, reported as such, and measured again as it was."""

from pathlib import Path

import pytest

from msn_eval import evaluate
from msn_eval.config.request import EvaluationConfig
from msn_eval.evaluation.baseline_plan import make_baseline_plans
from msn_eval.evaluation.plan import make_plan
from msn_eval.reports.html.provenance import format_command
from msn_eval.results.baseline import make_baseline
from msn_eval.results.folder import list_results
from msn_eval.results.record import Result
from msn_eval.results.table import make_table


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a result folder: raw pixels of the digits, two images per class, lambda given and chosen."""
    folder = tmp_path_factory.mktemp("auto") / "runs"
    evaluate(
        ["pixels"],
        data="digits",
        subsets=["2imgs@1"],
        lambda_=["0.0025", "auto"],
        out=folder,
        device="cpu",
        no_cache=True,
    )
    return folder


@pytest.fixture
def chosen(runs: Path) -> Result:
    (found,) = (result for result in list_results([runs]) if "auto" in result.probe.params)
    return found


def test_record_holds_the_strength_and_the_rule_that_chose_it(chosen: Result) -> None:
    assert chosen.probe.chosen is not None
    assert chosen.probe.chosen["rule"] == "leave-one-out"
    assert set(chosen.probe.chosen) == {"lambda", "rule", "typical", "left_out_error"}
    assert chosen.probe.certificate is not None
    assert chosen.probe.certificate <= 1e-6


def test_rule_and_grid_are_hashed_and_the_choice_is_not(chosen: Result) -> None:
    params = {"auto": 1, "lambda_first": 1e-5, "lambda_last": 10.0, "lambdas": 13}

    assert chosen.protocol["probe"] == {"name": "logistic", "version": 1, "params": params}


def test_given_and_chosen_strengths_never_share_a_table(runs: Path) -> None:
    columns = make_table(list_results([runs])).columns

    assert {(column.group, column.lines[-1]) for column in columns} == {
        ("logistic on digits", "λ=0.0025"),
        ("logistic λ=auto on digits", "λ=auto"),
    }


def test_command_asks_for_it_again(chosen: Result) -> None:
    assert "--lambda auto" in format_command(chosen)


def test_baseline_measures_it_again(runs: Path) -> None:
    results = list_results([runs])
    config = EvaluationConfig(checkpoint=["pixels"], data="digits", device="cpu", no_cache=True)

    plans = make_baseline_plans(make_baseline(results, [runs]), config)

    assert {task.protocol_id for plan in plans for task in plan.tasks} == {result.protocol_id for result in results}


@pytest.mark.parametrize(
    ("requested", "params"),
    [([], [0.0025]), (["auto"], [None]), (["1", "auto", "1.0"], [1.0, None])],
    ids=["nothing", "auto", "both"],
)
def test_a_list_may_hold_numbers_and_auto(requested: list[str], params: list[float | None]) -> None:
    config = EvaluationConfig(checkpoint=["pixels"], data="digits", subset=["1img@1"], lambda_=requested, no_cache=True)

    assert [task.params.get("lambda") for task in make_plan(config).tasks] == params
