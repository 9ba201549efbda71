"""Probes: what is fitted to labelled images on top of an encoder.

`msn_eval.probes.base` describes how to write one. A probe of this package is one module and one line of `PROBES`; an
installed distribution adds its own by an entry point of the group `msn_eval.probes`.
"""

from msn_eval.registry import Entry, find_entry, read_registry

PROBES = (
    Entry(
        name="logistic",
        summary="L2-regularised multinomial regression, the protocol of the MSN tables",
        target="msn_eval.probes.logistic:configure",
    ),
    Entry(
        name="knn",
        summary="weighted nearest neighbours, every k and temperature from one search",
        target="msn_eval.probes.knn:configure",
    ),
    Entry(
        name="ridge",
        summary="ridge regression onto classes, its strength by exact leave-one-out error",
        target="msn_eval.probes.ridge:configure",
    ),
    Entry(name="ncm", summary="nearest class mean", target="msn_eval.probes.ncm:configure"),
    Entry(
        name="linear",
        summary="a linear layer by SGD, chosen from a grid of learning rates and weight decays on held-out labelled images",
        target="msn_eval.probes.linear:configure",
    ),
    Entry(
        name="linear-augmented",
        summary="norm and linear layer by SGD on the frozen encoder's features of random crops and flips",
        target="msn_eval.probes.linear_augmented:configure",
    ),
    Entry(
        name="finetune",
        summary="encoder and head trained together, from images; never in one column with frozen features",
        target="msn_eval.probes.finetune:configure",
    ),
)


def read_probes() -> dict[str, Entry]:
    """Return every probe by name: those of `PROBES`, then those of installed plug-ins."""
    return read_registry("probes", PROBES)


def find_probe(name: str) -> Entry:
    """Return the probe called `name`.

    Raises:
        UsageError: There is no such probe.
    """
    return find_entry(read_probes(), name, what="probe", option="--probe")
