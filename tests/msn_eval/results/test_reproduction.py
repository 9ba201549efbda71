"""Reproductions: verdicts follow from the published number, its spread and the draws."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from msn_eval.checkpoints.msn_release import MSN_RELEASES
from msn_eval.config.request import EvaluationConfig
from msn_eval.errors import UsageError
from msn_eval.results.folder import list_results
from msn_eval.results.record import Result
from msn_eval.results.reproduction import (
    NETWORKS,
    Reproduction,
    find_reproductions,
    judge,
    list_reproductions,
    request_options,
)

Measured = Callable[..., list[Result]]


@pytest.fixture
def measured(digits_runs: Path) -> Measured:
    """Return a function that makes three draws of one logistic protocol with given accuracies."""
    draws = [r for r in list_results([digits_runs]) if r.probe.name == "logistic" and r.split.subset == "1img"]

    def make(*percents: float) -> list[Result]:
        return [
            replace(result, metrics=result.metrics and replace(result.metrics, top1=percent / 100))
            for result, percent in zip(draws, percents, strict=True)
        ]

    return make


def _make_reproduction(*, spread: float | None = 0.3, known: bool = True) -> Reproduction:
    return Reproduction(
        name="x-5imgs", network=NETWORKS[0], subset="5imgs", probe="logistic",
        strength=(0.0025, "a command") if known else None, expected=62.8, spread=spread, epochs="800", source="a table",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("percents", "judgement"),
    [
        ((62.8, 62.8, 62.8), "reproduced"),
        ((62.5, 62.5, 62.5), "reproduced"),  # 62.8 - 62.5 is above 0.3 in binary
        ((63.1, 63.1, 63.1), "reproduced"),
        ((63.14, 63.14, 63.14), "reproduced"),  # printed as 63.1
        ((63.16, 63.16, 63.16), "differs"),
        ((62.4, 62.4, 62.4), "differs"),
        ((60.0, 62.8, 65.6), "reproduced"),  # the mean is what was published
    ],
)
def test_verdict_compares_the_rounded_mean_with_the_published_spread(
    percents: tuple[float, ...], judgement: str, measured: Measured
) -> None:
    (verdict,) = judge(_make_reproduction(), measured(*percents), draws=3)

    assert verdict.judgement == judgement


@pytest.mark.parametrize(
    ("reproduction", "reason"),
    [
        (_make_reproduction(known=False), "the published lambda is unknown"),
        (_make_reproduction(spread=None), "the publication states no spread"),
    ],
)
def test_unknown_lambda_or_spread_leads_to_no_verdict(
    reproduction: Reproduction, reason: str, measured: Measured
) -> None:
    (verdict,) = judge(reproduction, measured(62.8, 62.8, 62.8), draws=3)

    assert (verdict.judgement, verdict.reason) == ("no verdict", reason)
    assert verdict.measured == pytest.approx(62.8)


@pytest.mark.parametrize("status", ["missing", "failed", "not_converged"])
def test_invalid_draw_leads_to_no_verdict(status: str, measured: Measured) -> None:
    first, *others = measured(62.8, 62.8, 62.8)
    invalid = [replace(first, status=status, metrics=None if status == "failed" else first.metrics)]

    (verdict,) = judge(_make_reproduction(), others if status == "missing" else [*invalid, *others], draws=3)

    assert (verdict.judgement, verdict.measured) == ("no verdict", None)
    assert verdict.reason == "a valid result for 2 of 3 draws"


def test_numbers_of_the_paper_are_listed() -> None:
    listed = {one.name: (one.expected, one.spread) for one in list_reproductions()}

    assert listed["msn-vits16-1img"] == (47.1, 0.1)
    assert listed["msn-vitb4-1pct"] == (75.7, None)
    assert listed["msn-vitl7-knn"] == (79.2, None)
    assert listed["dino-vitb16-5imgs"] == (61.4, 0.2)
    assert listed["ibot-vits16-1pct"] == (65.9, None)
    assert len(listed) == len(list_reproductions()) == 43


def test_only_a_published_lambda_with_a_spread_can_have_a_verdict() -> None:
    lambdas = {number.name: number.strength[0] for number in list_reproductions() if number.strength is not None}

    assert lambdas == {"msn-vits16-5imgs": 0.0025, "msn-vits16-1pct": 0.075}
    assert [number.name for number in list_reproductions() if not number.why_no_verdict] == ["msn-vits16-5imgs"]


def test_released_names_exist() -> None:
    released = {n.checkpoint for n in NETWORKS if n.checkpoint is not None and n.checkpoint.startswith("msn:")}

    without_numbers = {"msn:vitl16"}
    assert released == {f"msn:{name}" for name in MSN_RELEASES} - without_numbers


def test_network_name_selects_all_of_its_numbers() -> None:
    names = [one.name for one in find_reproductions("msn-vitl7")]

    assert names == ["msn-vitl7-1img", "msn-vitl7-2imgs", "msn-vitl7-5imgs", "msn-vitl7-1pct", "msn-vitl7-knn"]


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean msn-vits16-5imgs\?"):
        find_reproductions("msn-vits16-5img")


@pytest.mark.parametrize("reproduction", list_reproductions(), ids=lambda one: one.name)
def test_pinned_options_are_a_valid_float32_request(reproduction: Reproduction) -> None:
    assert EvaluationConfig(**request_options(reproduction)).precision == "fp32"  # type: ignore[arg-type]
