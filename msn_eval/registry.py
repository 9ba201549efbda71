"""Registries: one table of named implementations per kind, to which installed distributions add through entry points.

A folder lists its own implementations as `Entry` objects and passes them to `read_registry`. Nothing is imported until
`Entry.load` is called, so listing names is fast.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from msn_eval.errors import UsageError, did_you_mean

Kind = Literal["probes", "datasets", "encoders", "reports"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named implementation.

    Attributes:
        name: What users type.
        summary: One line for `msn-eval ls`.
        target: Where it is defined: `package.module:object`, or `package.module` for a module.
        distribution: Name and version of the distribution that adds it, None for a built-in one.
    """

    name: str
    summary: str
    target: str
    distribution: str | None = None

    def load(self) -> object:
        """Import the implementation and return it.

        Raises:
            UsageError: A plug-in cannot be imported.
        """
        point = EntryPoint(name=self.name, value=self.target, group="")
        try:
            return point.load()
        except Exception as error:
            if self.distribution is None:
                raise
            raise UsageError(
                f"The plug-in {self.name!r} of {self.distribution} cannot be imported: {type(error).__name__}: {error}",
                where=self.target,
                hint="Update or uninstall that distribution.",
            ) from error


def read_registry(kind: Kind, built_in: Iterable[Entry]) -> dict[str, Entry]:
    """Return the implementations of a kind by name: the built-in ones, then those of entry points `msn_eval.KIND`.

    Raises:
        UsageError: A plug-in has the name of another implementation.
    """
    registry = {entry.name: entry for entry in built_in}
    for point in sorted(entry_points(group=f"msn_eval.{kind}"), key=lambda point: (point.name, point.value)):
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
        entry = Entry(
            name=point.name, summary=f"plug-in of {distribution}", target=point.value, distribution=distribution
        )
        if (taken := registry.get(point.name)) is not None and taken.target != entry.target:
            raise UsageError(
                f"{distribution} adds {point.name!r} to {kind}, but that name is taken by "
                f"{taken.distribution or 'msn-eval'}",
                where=point.value,
                hint="Rename the entry point, or uninstall that distribution.",
            )
        registry[point.name] = entry
    return registry


def find_entry(registry: dict[str, Entry], name: str, *, what: str, option: str = "") -> Entry:
    """Return the entry called `name`.

    Args:
        registry: As returned by `read_registry`.
        name: What the user typed.
        what: What it names, for the error, such as "probe".
        option: Where the user typed it, for the error.

    Raises:
        UsageError: There is no such entry.
    """
    if name not in registry:
        raise UsageError(
            f"No {what} is called {name!r}.{did_you_mean(name, registry)}",
            where=option,
            hint=f"Known: {', '.join(registry)}.",
        )
    return registry[name]
