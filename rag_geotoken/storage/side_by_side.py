"""This module computes parts of a batch in parallel, one per core, so that threads need not wait for each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import local
from typing import TypeVar

import torch

MOST = 8  # parts at a time, for the memory that each of them takes
Part = TypeVar("Part")
Result = TypeVar("Result")
_worker = local()


def cores() -> int:
    """Return how many parts run at a time: PyTorch's threads; 1 inside a part, and where a GPU does the work."""
    busy = getattr(_worker, "busy", False) or torch.cuda.is_available()
    return 1 if busy else min(torch.get_num_threads(), MOST)


def side_by_side(work: Callable[[Part], Result], parts: Sequence[Part], of: int = 0) -> Iterator[Result]:
    """Yield what ``work`` returns for each part, in order; several parts are computed at a time.

    Threads that share one product wait for each other after every layer, and for one that a busy process interrupts;
    independent parts do not, each with its share of PyTorch's threads. of: how many parts there were before some were
    done; sums round differently with another number of threads, so the rest gets the share that it would have had.
    What ``work`` raises is raised again once the parts begun have ended; the others are not begun.
    """
    workers = min(cores(), max(of, len(parts)))
    if workers <= 1:
        yield from map(work, parts)
        return
    threads, inference, grad = torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def run(part: Part) -> Result:
        _worker.busy = True
        _set_threads(threads // workers)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(part)

    futures = [_pool(workers).submit(run, part) for part in parts]
    try:
        for future in futures:
            yield future.result()
    finally:
        wait([future for future in futures if not future.cancel()])
        _set_threads(threads)


@cache  # threads that stay keep what oneDNN has prepared for them
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "side-by-side")


def _set_threads(threads: int) -> None:
    """Let this thread's products use so many threads; MKL's too, and those of threads started later."""
    torch.set_num_threads(threads)
    if faiss := sys.modules.get("faiss"):
        faiss.omp_set_num_threads(threads)
