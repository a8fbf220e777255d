"""All long work shows one kind of progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY = 10.0  # seconds


@contextmanager
def progress_bar(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, which says how many more of `total` are done.

    A bar with the time left on a terminal; elsewhere a plain line at most every ten seconds. All on standard error.
    """
    if sys.stderr.isatty():
        yield from _bar(total, description)
    else:
        yield _lines(total, description)


def _bar(total: int, description: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


def _lines(total: int, description: str) -> Callable[[int], None]:
    done, begun = 0, time.monotonic()
    said = begun

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        now = time.monotonic()
        if now - said >= LINE_EVERY:
            said = now
            left = (now - begun) * (total - done) / max(done, 1)
            print(f"{description}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    return advance
