"""What about weights should make their reader doubt them, though they load."""

from collections.abc import Mapping

from msn_eval.checkpoints.families import classifier_classes
from msn_eval.checkpoints.networks import ChosenNetwork
from msn_eval.checkpoints.sanity_checks import TensorFacts

_SHOWN = 3


def find_alarms(choice: ChosenNetwork, facts: Mapping[str, TensorFacts]) -> tuple[str, ...]:
    """Give what is doubtful about the network chosen for evaluation, a sentence each.

    facts: of the weights that are used, by name
    NaN and infinite values; matrices of zeros alone; norms that were never trained; a student where there is a teacher; a
    classifier on top, which means that labels were seen.
    """
    found = []
    not_finite = [name for name, one in facts.items() if one.not_finite]
    if not_finite:
        found.append(f"NaN or infinite values in {_listed(not_finite)}")
    zero = [name for name, one in facts.items() if name.endswith("weight") and one.all_equal(0)]
    if zero:
        found.append(f"nothing but zeros in {_listed(zero)}")
    if _are_untouched(facts):
        found.append("every norm has its initial values (scale 1, shift 0): these weights look untrained")
    if choice.passed_over is not None:
        found.append(f"{choice.passed_over.key!r} stands beside it, and is what the method's authors evaluate")
    classes = classifier_classes(choice.network)
    if classes is not None:
        found.append(
            f"a classifier of {classes:,} classes is on top: the weights were trained or fine-tuned with labels"
        )
    return tuple(found)


def _are_untouched(facts: Mapping[str, TensorFacts]) -> bool:
    """Tell whether every norm is as it was initialised: a vector of scales beside a vector of shifts as long."""
    norms = []
    for name, scale in facts.items():
        shift = facts.get(name.removesuffix("weight") + "bias") if name.endswith(".weight") else None
        if shift is not None and shift.values == scale.values:
            norms.append((scale, shift))
    return bool(norms) and all(scale.all_equal(1) and shift.all_equal(0) for scale, shift in norms)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
