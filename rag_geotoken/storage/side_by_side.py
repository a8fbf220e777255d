"""Parts of a batch are computed side by side, one a core, so that no thread waits for another at every layer."""

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
    """Yield what ``work`` makes of each part, in order; several parts are computed at a time.

    Threads that share one product wait for each other after every layer, and beside a busy process for the one that
    was put aside. Parts that follow from nothing but themselves need not: each has its share of PyTorch's threads.
    of: how many parts there were before some were done; sums round differently by another number of threads, so the
    rest has the share that it would have had. What ``work`` raises is raised here, once the parts begun have ended;
    the others are not begun.
    """
    workers = min(cores(), max(of, len(parts)))
    if workers <= 1:
        yield from map(work, parts)
        return
    threads, inference, grad = torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alike(part: Part) -> Result:
        _worker.busy = True
        _use(threads // workers)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(part)

    begun = [_pool(workers).submit(alike, part) for part in parts]
    try:
        for future in begun:
            yield future.result()
    finally:
        wait([future for future in begun if not future.cancel()])
        _use(threads)


@cache  # threads that stay keep what oneDNN has prepared for them
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "side-by-side")


def _use(threads: int) -> None:
    """Let this thread's products be shared by so many threads; MKL's too, and those of threads to come."""
    torch.set_num_threads(threads)
    if faiss := sys.modules.get("faiss"):
        faiss.omp_set_num_threads(threads)
