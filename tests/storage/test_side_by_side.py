"""Parts are computed side by side in order, each with its share of the threads, and none after a failure."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest
import torch
from torch import Tensor

from rag_geotoken.storage import side_by_side as module
from rag_geotoken.storage.side_by_side import cores, side_by_side


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def test_results_come_in_order_from_several_threads() -> None:
    meeting = threading.Barrier(2, timeout=20)  # passed only where two parts are computed at a time

    def work(part: int) -> tuple[int, int, int]:
        meeting.wait()
        return part, torch.get_num_threads(), cores()

    assert list(side_by_side(work, range(6))) == [(part, 1, 1) for part in range(6)]
    assert torch.get_num_threads() == 2 and cores() == 2


def test_a_part_alone_keeps_all_threads() -> None:
    thread = threading.get_ident()
    assert list(side_by_side(lambda part: (threading.get_ident(), torch.get_num_threads()), [0])) == [(thread, 2)]
    assert list(side_by_side(str, [])) == []


def test_what_is_left_of_several_parts_has_their_share_of_threads() -> None:
    assert list(side_by_side(lambda part: torch.get_num_threads(), [0], of=3)) == [1]


def test_inside_a_part_nothing_is_divided_again() -> None:
    def work(part: int) -> list[int]:
        return list(side_by_side(lambda _: threading.get_ident(), range(4)))

    assert all(len(set(threads)) == 1 for threads in side_by_side(work, range(3)))


@pytest.mark.parametrize("grad", [True, False])
def test_a_part_knows_what_the_caller_knows_of_gradients(grad: bool) -> None:
    weight = torch.ones(3, requires_grad=True)

    def work(part: int) -> Tensor:
        return weight * part

    with torch.set_grad_enabled(grad):
        assert all(product.requires_grad == grad for product in side_by_side(work, range(4)))
    with torch.inference_mode():
        assert all(product.is_inference() for product in side_by_side(work, range(4)))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_a_part_raises_ends_it_all(kind: type[BaseException]) -> None:
    begun, numbers = list[int](), count()

    def work(part: int) -> int:
        begun.append(next(numbers))
        if part == 1:
            raise kind("no")
        time.sleep(0.001)
        return part

    with pytest.raises(kind, match="no"):
        list(side_by_side(work, range(1000)))
    assert len(begun) < 1000 and torch.get_num_threads() == 2
    many = len(begun)
    assert list(side_by_side(lambda part: part, range(3))) == [0, 1, 2] and len(begun) == many


def test_on_a_gpu_parts_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    assert len({*side_by_side(lambda part: threading.get_ident(), range(8))}) == 1
