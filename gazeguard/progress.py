"""Progress display on stderr: bars and spinners, shown on a terminal alone, and switched off by `show_progress`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

T = TypeVar("T")
_shown = True


def show_progress(shown: bool) -> None:
    """Switch every progress display of the package on or off; without a terminal there is none anyway."""
    global _shown
    _shown = shown


def bar(*columns: str | ProgressColumn, transient: bool = False) -> Progress:
    """Build a `rich.progress.Progress` on stderr, to be used as a context manager, with these columns or rich's default."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=transient, disable=not (_shown and console.is_terminal))


def track(values: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Iterate over values, with a bar that disappears at the end.

    Args:
        values: What is iterated over.
        description: Stands before the bar.
        total: How many values there are; by default their length, if they have one.

    Yields:
        The values.
    """
    with bar(transient=True) as progress:
        count = len(values) if total is None and isinstance(values, Collection) else total
        yield from progress.track(values, total=count, description=description)


@contextmanager
def status(description: str) -> Iterator[Any]:
    """Show a spinner while the block runs."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (_shown and console.is_terminal):
        yield None
        return
    with console.status(description) as spinner:
        yield spinner
