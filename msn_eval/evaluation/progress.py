"""Progress of an evaluation that Python code starts: tqdm's bars, in the form of the notebook where there is one."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def draw_progress(wanted: bool | None) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield a callback that draws a bar for each pass over images, or None if no bars are wanted.

    Args:
        wanted: Whether to draw them; None means in notebooks only.
    """
    from tqdm.auto import tqdm  # chooses between the console and the notebook

    in_notebook = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)
    if not (in_notebook if wanted is None else wanted):
        yield None
        return
    with contextlib.ExitStack() as stack:
        bars: dict[str, Any] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = stack.enter_context(tqdm(desc=what, total=total, unit="images", leave=False))
            bars[what].update(done - bars[what].n)

        yield draw
