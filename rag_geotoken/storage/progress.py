"""This module shows the progress of all long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY = 10.0  # seconds


@contextmanager
def progress_bar(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, which reports that n more of `total` are done, on standard error.

    A terminal shows a bar with the time left; elsewhere a plain line appears at most every ten seconds.
    """
    if not sys.stderr.isatty():
        yield _lines(total, description)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name, left = TextColumn("{task.description}", markup=False), TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(name, BarColumn(), MofNCompleteColumn(), left, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


def _lines(total: int, description: str) -> Callable[[int], None]:
    done, begun = 0, time.monotonic()
    printed = begun

    def advance(n: int) -> None:
        nonlocal done, printed
        done += n
        now = time.monotonic()
        if now - printed >= LINE_EVERY:
            printed = now
            left = (now - begun) * (total - done) / max(done, 1)
            print(f"{description}: {done} of {total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    return advance
