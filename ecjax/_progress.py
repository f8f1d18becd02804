"""Progress of long work: a bar with rich, plain lines without it, or a function of the user's own."""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ecjax import _checks

# True for a bar, or a function that is called after each step with what is known of it, or neither.
Progress = bool | Callable[[Any], None] | None


def require(progress: Any) -> None:
    """Raises a ValueError unless this is True, False, None or a function."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ValueError(
            f"progress is {progress!r}; it must be True, for a bar, or a function, which is called after each step"
        )


@contextlib.contextmanager
def told(progress: Progress, unit: str, total: int | None, shown: tuple[str, ...]) -> Iterator[Callable[[Any], None]]:
    """Gives the function that is to be called after each step, with what is known of it as a NamedTuple.

    Args:
        progress: what the user asked for; nothing is shown for None and False.
        unit: what a step is called.
        total: how many steps there will be; None if that is not known.
        shown: which fields of the NamedTuple stand beside the bar.
    """
    if not progress:
        yield lambda _: None
    elif callable(progress):
        yield progress
    else:
        with _bar(unit, total) if can_draw() else contextlib.nullcontext(_lines(unit, total)) as show:
            yield lambda step: show("".join(f", {name} {_text(getattr(step, name))}" for name in shown))


def can_draw() -> bool:
    """Whether there is rich, and a terminal or a notebook that it can draw in."""
    if importlib.util.find_spec("rich") is None:
        return False
    from rich.console import Console  # here, as importing ecjax must not wait for it

    console = Console(stderr=True)
    if not console.is_jupyter:
        return console.is_terminal
    from IPython.core.getipython import get_ipython

    # Under %%capture, IPython shows things by an object that the widget rich draws in can't use.
    shows = getattr(get_ipython(), "display_pub", None)
    return importlib.util.find_spec("ipywidgets") is not None and hasattr(shows, "set_parent")


@contextlib.contextmanager
def _bar(unit: str, total: int | None) -> Iterator[Callable[[str], None]]:
    from rich import progress as rich
    from rich.console import Console

    times = rich.TimeElapsedColumn(), rich.TextColumn("elapsed,"), rich.TimeRemainingColumn(), rich.TextColumn("left")
    shown = rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), *times
    with rich.Progress(*shown, console=Console(stderr=True)) as bar:
        task = bar.add_task(unit, total=total)
        yield lambda facts: bar.update(task, advance=1, description=unit + facts)


def _lines(unit: str, total: int | None) -> Callable[[str], None]:
    started, done = time.monotonic(), 0

    def show(facts: str) -> None:
        nonlocal done
        done += 1
        taken = time.monotonic() - started
        left = f", {taken * (total - done) / done:.0f} s left" if total else ""
        of = f" of {total}" if total else ""
        print(f"{unit} {done}{of}{facts}, {taken:.0f} s{left}", file=sys.stderr, flush=True)

    return show


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{pattern}: {_text(number)}" for pattern, number in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{float(value):.4g}" if _checks.are_known(value) else "traced"
