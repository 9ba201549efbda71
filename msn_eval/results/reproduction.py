"""Reproduction: a published low-shot number, all that it was measured with, and whether ours agrees with it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from msn_eval.config.recipes import Params
from msn_eval.errors import UsageError, did_you_mean
from msn_eval.results.published import PublishedNumber, published_file, read_published
from msn_eval.results.record import Result

_LOW_SHOT = ("1img", "2imgs", "5imgs", "1pct")
_PAPER = "arXiv:2204.07141"
_NEIGHBOURS_SOURCE = "arXiv:2304.07193 Table 4"
_PRETRAINING, _METRIC = "ImageNet-1K", "top1"
_DECIMALS = 1  # of the published numbers
_MSN_README = "the example command in the README of github.com/facebookresearch/msn"
_MSN_AUTHORS = "an answer of the authors to a user of github.com/facebookresearch/msn"
# What the publications say of lambda, and where; of every other cell they say nothing.
_LAMBDAS = {"msn-vits16-5imgs": (0.0025, _MSN_README), "msn-vits16-1pct": (0.075, _MSN_AUTHORS)}

Judgement = Literal["reproduced", "differs", "no verdict"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """A published network.

    method, printed_arch: as the table of published numbers writes them
    arch:       what its weights must turn out to be
    checkpoint: its weights by name, None where no name brings them
    by_hand:    where its weights are to be had otherwise
    """

    name: str
    method: str
    printed_arch: str
    arch: str
    checkpoint: str | None
    by_hand: str = ""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A published number, in percent as printed. spread: over draws, None where none was published."""

    value: float
    spread: float | None
    epochs: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One published number and what pins its measurement.

    strength: lambda and where it was published, None where it was not
    """

    name: str
    network: Network
    subset: str
    probe: Literal["logistic", "knn"]
    strength: tuple[float, str] | None
    expected: Expected

    @property
    def tolerance(self) -> float | None:
        """Give the published spread in points, None where nothing was published that a difference could be held against."""
        return self.expected.spread if self.strength is not None else None

    @property
    def why_no_verdict(self) -> str:
        """Say what the publication leaves open, or nothing where it pins all."""
        if self.probe == "knn":
            return "which k the publication reports is unknown, and it states no spread"
        if self.strength is None:
            return "the published lambda is unknown"
        return "" if self.expected.spread is not None else "the publication states no spread"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came out, in percent. params: of the probe, as measured; std: over draws, None for one draw."""

    params: Params
    measured: float | None
    std: float | None
    draws: int
    judgement: Judgement
    reason: str


def _network(method: str, size: str, patch: int, checkpoint: str | None, by_hand: str = "") -> Network:
    return Network(
        name=f"{method.lower()}-vit{size[0]}{patch}",
        method=method,
        printed_arch=f"ViT-{size[0].upper()}/{patch}",
        arch=f"vit_{size}_patch{patch}_224",
        checkpoint=checkpoint,
        by_hand=by_hand,
    )


_IBOT_FILE = "the teacher's weights, listed in the README of github.com/bytedance/ibot"
NETWORKS = (
    _network("MSN", "small", 16, "msn:vits16"),
    _network("MSN", "base", 16, "msn:vitb16"),
    _network("MSN", "base", 8, None, "its weights were not released"),
    _network("MSN", "base", 4, "msn:vitb4"),
    _network("MSN", "large", 7, "msn:vitl7"),
    _network("DINO", "small", 16, "timm:vit_small_patch16_224.dino"),
    _network("DINO", "base", 16, "timm:vit_base_patch16_224.dino"),
    _network("DINO", "small", 8, "timm:vit_small_patch8_224.dino"),
    _network("DINO", "base", 8, "timm:vit_base_patch8_224.dino"),
    _network("iBOT", "small", 16, None, _IBOT_FILE),
    _network("iBOT", "base", 16, None, _IBOT_FILE),
)


@cache
def list_reproductions() -> tuple[Reproduction, ...]:
    """Give every published number that can be named, network by network."""
    found = []
    for network in NETWORKS:
        for subset in _LOW_SHOT:
            expected = _expected(network, probe="logistic", subset=subset, source=_PAPER)
            if expected is not None:
                name = f"{network.name}-{subset}"
                found.append(_reproduction(name, network, subset, "logistic", expected))
        neighbours = _expected(network, probe="knn", subset="full", source=_NEIGHBOURS_SOURCE)
        if network.name == "msn-vitl7" and neighbours is not None:
            found.append(_reproduction(f"{network.name}-knn", network, "full", "knn", neighbours))
    return tuple(found)


def _reproduction(
    name: str, network: Network, subset: str, probe: Literal["logistic", "knn"], expected: Expected
) -> Reproduction:
    strength = _LAMBDAS.get(name)
    return Reproduction(name=name, network=network, subset=subset, probe=probe, strength=strength, expected=expected)


def _expected(network: Network, *, probe: str, subset: str, source: str) -> Expected | None:
    """Give the one published number of a network under a protocol, or None where the source prints none."""
    wanted = (network.method, network.printed_arch, _PRETRAINING, probe, subset, _METRIC)
    numbers = [
        one
        for one in _published()
        if (one.method, one.arch, one.pretraining, one.probe, one.subset, one.metric) == wanted
        and one.source.startswith(source)
    ]
    if not numbers:
        return None
    (number,) = numbers
    spread = None if number.std is None else float(number.std)
    return Expected(value=float(number.percent), spread=spread, epochs=number.epochs, source=number.source)


@cache
def _published() -> tuple[PublishedNumber, ...]:
    return read_published(published_file())


def find_reproductions(name: str) -> tuple[Reproduction, ...]:
    """Give the published number called `name`, or all of the network called so. Raises UsageError for an unknown name."""
    known = list_reproductions()
    found = tuple(one for one in known if name in (one.name, one.network.name))
    if not found:
        hint = did_you_mean(name, [*(one.name for one in known), *(network.name for network in NETWORKS)])
        raise UsageError(f"no published number is called so.{hint}", where=name, hint="See msn-eval reproduce --list.")
    return found


def request_options(reproduction: Reproduction) -> dict[str, object]:
    """Give the options of an evaluation that a reproduction pins; the publications' numbers are float32."""
    pinned: dict[str, object] = {
        "subset": [reproduction.subset],
        "probe": [reproduction.probe],
        "precision": "fp32",
        "decoder": "pillow",
    }
    if reproduction.strength is not None:
        pinned["lambda_"] = [repr(reproduction.strength[0])]
    return pinned


def judge(reproduction: Reproduction, results: Sequence[Result], *, draws: int) -> tuple[Verdict, ...]:
    """Hold what was measured against what was published: one verdict for each setting of the probe.

    results: of this reproduction's network, subset and probe
    draws:   how many there must be for each setting
    """
    by_params: dict[str, list[Result]] = {}
    for result in results:
        by_params.setdefault(str(dict(result.probe.params)), []).append(result)
    return tuple(_judge(reproduction, alike, draws) for alike in by_params.values())


def _judge(reproduction: Reproduction, results: Sequence[Result], draws: int) -> Verdict:
    params = results[0].probe.params
    scores = [100 * result.metrics.top1 for result in results if result.metrics is not None]
    sound = len(scores) == len(results) == draws and all(result.status == "ok" for result in results)
    if not sound:
        return Verdict(
            params=params, measured=None, std=None, draws=len(scores), judgement="no verdict",
            reason=f"{sum(result.status == 'ok' for result in results)} of {draws} draws came out sound",
        )  # fmt: skip
    measured = statistics.fmean(scores)
    std = statistics.stdev(scores) if draws > 1 else None
    judgement, reason = _compared(reproduction, measured)
    return Verdict(params=params, measured=measured, std=std, draws=draws, judgement=judgement, reason=reason)


def _compared(reproduction: Reproduction, measured: float) -> tuple[Judgement, str]:
    if reproduction.tolerance is None:
        return "no verdict", reproduction.why_no_verdict
    # In tenths, as published: a number must not fall out of the tolerance by digits that nobody printed.
    scale = 10**_DECIMALS
    published, allowed = (round(number * scale) for number in (reproduction.expected.value, reproduction.tolerance))
    difference = round(measured * scale) - published
    text = f"{difference / scale:+.{_DECIMALS}f} points, {reproduction.tolerance} allowed"
    return ("reproduced" if abs(difference) <= allowed else "differs"), text
