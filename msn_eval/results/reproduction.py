"""Reproduction: a published low-shot number, the settings that it was measured with, and whether ours agrees."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from msn_eval.config.recipes import Params
from msn_eval.errors import UsageError, did_you_mean, format_count
from msn_eval.results.published import read_published
from msn_eval.results.record import Result
from msn_eval.results.statistics import draw_spread

if TYPE_CHECKING:
    import pandas as pd

_LOW_SHOT = ("1img", "2imgs", "5imgs", "1pct")
_PAPER = "arXiv:2204.07141"
_KNN_SOURCE = "arXiv:2304.07193 Table 4"
_MSN_README = "the example command in the README of github.com/facebookresearch/msn"
_MSN_AUTHORS = "an answer of the authors to a user of github.com/facebookresearch/msn"
# The lambdas that are published, and where. All others are unknown.
_LAMBDAS = {"msn-vits16-5imgs": (0.0025, _MSN_README), "msn-vits16-1pct": (0.075, _MSN_AUTHORS)}

ProbeName = Literal["logistic", "knn"]
Judgement = Literal["reproduced", "differs", "no verdict"]


@dataclass(frozen=True)
class Network:
    """A published network.

    Attributes:
        method: Method, as in the file of published numbers.
        printed_arch: Architecture, as in the file of published numbers.
        arch: timm architecture that its weights must have.
        checkpoint: Checkpoint name of its weights, None where there is none.
        by_hand: How to get its weights otherwise.
    """

    name: str
    method: str
    printed_arch: str
    arch: str
    checkpoint: str | None
    by_hand: str = ""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One published number and what its measurement is pinned to.

    Attributes:
        strength: Lambda, and where it was published. None where it was not.
        expected: The published number in percent, as printed.
        spread: Its spread over draws in percent, None where none was published.
        epochs: Epochs of pre-training, as printed.
        source: The publication.
    """

    name: str
    network: Network
    subset: str
    probe: ProbeName
    strength: tuple[float, str] | None
    expected: float
    spread: float | None
    epochs: str
    source: str

    @property
    def tolerance(self) -> float | None:
        """The published spread in points, None where nothing was published that a difference could be compared with."""
        return self.spread if self.strength is not None else None

    @property
    def why_no_verdict(self) -> str:
        """What the publication leaves open, or an empty string."""
        if self.probe == "knn":
            return "which k the publication reports is unknown, and it states no spread"
        if self.strength is None:
            return "the published lambda is unknown"
        return "" if self.spread is not None else "the publication states no spread"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome for one setting of the probe, in percent. `std` is over draws, None for one draw."""

    params: Params
    measured: float | None
    std: float | None
    draws: int
    judgement: Judgement
    reason: str


_IBOT_FILE = "the teacher's weights, listed in the README of github.com/bytedance/ibot"
NETWORKS = (
    Network("msn-vits16", "MSN", "ViT-S/16", "vit_small_patch16_224", "msn:vits16"),
    Network("msn-vitb16", "MSN", "ViT-B/16", "vit_base_patch16_224", "msn:vitb16"),
    Network("msn-vitb8", "MSN", "ViT-B/8", "vit_base_patch8_224", None, "its weights were not released"),
    Network("msn-vitb4", "MSN", "ViT-B/4", "vit_base_patch4_224", "msn:vitb4"),
    Network("msn-vitl7", "MSN", "ViT-L/7", "vit_large_patch7_224", "msn:vitl7"),
    Network("dino-vits16", "DINO", "ViT-S/16", "vit_small_patch16_224", "timm:vit_small_patch16_224.dino"),
    Network("dino-vitb16", "DINO", "ViT-B/16", "vit_base_patch16_224", "timm:vit_base_patch16_224.dino"),
    Network("dino-vits8", "DINO", "ViT-S/8", "vit_small_patch8_224", "timm:vit_small_patch8_224.dino"),
    Network("dino-vitb8", "DINO", "ViT-B/8", "vit_base_patch8_224", "timm:vit_base_patch8_224.dino"),
    Network("ibot-vits16", "iBOT", "ViT-S/16", "vit_small_patch16_224", None, _IBOT_FILE),
    Network("ibot-vitb16", "iBOT", "ViT-B/16", "vit_base_patch16_224", None, _IBOT_FILE),
)


@cache
def list_reproductions() -> tuple[Reproduction, ...]:
    """Return every published number that has a name, network by network."""
    numbers = read_published()
    numbers = numbers[(numbers["pretraining"] == "ImageNet-1K") & (numbers["metric"] == "top1")]
    return tuple(reproduction for network in NETWORKS for reproduction in _list_numbers(network, numbers))


def _list_numbers(network: Network, numbers: "pd.DataFrame") -> Iterator[Reproduction]:
    numbers = numbers[(numbers["method"] == network.method) & (numbers["arch"] == network.printed_arch)]
    cells: list[tuple[str, str, ProbeName, str]] = [(subset, subset, "logistic", _PAPER) for subset in _LOW_SHOT]
    if network.name == "msn-vitl7":
        cells.append(("knn", "full", "knn", _KNN_SOURCE))
    for suffix, subset, probe, source in cells:
        is_cell = (numbers["probe"] == probe) & (numbers["subset"] == subset)
        for number in numbers[is_cell & numbers["source"].str.startswith(source)].to_dict("records"):
            name = f"{network.name}-{suffix}"
            yield Reproduction(
                name=name,
                network=network,
                subset=subset,
                probe=probe,
                strength=_LAMBDAS.get(name),
                expected=float(number["percent"]),
                spread=float(number["std"]) if number["std"] else None,
                epochs=number["epochs"],
                source=number["source"],
            )


def find_reproductions(name: str) -> tuple[Reproduction, ...]:
    """Return the published number called `name`, or all numbers of the network of that name.

    Raises:
        UsageError: The name is unknown.
    """
    known = list_reproductions()
    matches = tuple(number for number in known if name in (number.name, number.network.name))
    if not matches:
        names = [text for number in known for text in (number.name, number.network.name)]
        suggestion = did_you_mean(name, names)
        raise UsageError(f"no such published number.{suggestion}", where=name, hint="See msn-eval reproduce --list.")
    return matches


def request_options(reproduction: Reproduction) -> dict[str, object]:
    """Return the options of an evaluation that a reproduction pins. The published numbers are float32."""
    known = {} if reproduction.strength is None else {"lambda_": [repr(reproduction.strength[0])]}
    names = {"subset": [reproduction.subset], "probe": [reproduction.probe]}
    return {**names, **known, "precision": "fp32", "decoder": "pillow"}


def judge(reproduction: Reproduction, results: Sequence[Result], *, draws: int) -> tuple[Verdict, ...]:
    """Compare measurements with a published number: one verdict for each setting of the probe.

    Args:
        reproduction: The published number.
        results: Results of its network, subset and probe.
        draws: Required number of draws for each setting.
    """
    by_params: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_params[str(dict(result.probe.params))].append(result)
    return tuple(_judge_setting(reproduction, group, draws) for group in by_params.values())


def _judge_setting(reproduction: Reproduction, results: Sequence[Result], draws: int) -> Verdict:
    params = results[0].probe.params
    scores = [100 * result.metrics.top1 for result in results if result.metrics is not None]
    valid = sum(result.status == "ok" for result in results)
    if not valid == len(results) == draws:
        reason = f"a valid result for {valid} of {format_count(draws, 'draw')}"
        return Verdict(params=params, measured=None, std=None, draws=len(scores), judgement="no verdict", reason=reason)
    mean, std = statistics.fmean(scores), draw_spread(scores)
    judgement: Judgement = "no verdict"
    reason = reproduction.why_no_verdict
    if reproduction.tolerance is not None:
        # Compared in tenths, as published: digits that nobody printed must not decide.
        published, allowed = (round(10 * number) for number in (reproduction.expected, reproduction.tolerance))
        difference = round(10 * mean) - published
        judgement = "reproduced" if abs(difference) <= allowed else "differs"
        reason = f"{difference / 10:+.1f} points, {reproduction.tolerance} allowed"
    return Verdict(params=params, measured=mean, std=std, draws=draws, judgement=judgement, reason=reason)
