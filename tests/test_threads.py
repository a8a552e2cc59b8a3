"""Items of a batch shared out over threads."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from video_llama.utils.threads import _pool, map_on_threads


@pytest.fixture(autouse=True)
def four_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 9])
def test_results_come_in_the_order_of_the_items(number: int) -> None:
    batch = torch.arange(number * 2.0).view(number, 2)
    assert torch.equal(map_on_threads(lambda part: part * 2, batch), batch * 2)


@pytest.mark.usefixtures("no_gradients")
def test_threads_share_what_torch_may_use_and_leave_it_as_it_was() -> None:
    seen: set[tuple[str, int, int]] = set()

    def work(part: Tensor) -> Tensor:
        seen.add((threading.current_thread().name, len(part), torch.get_num_threads()))
        return part

    map_on_threads(work, torch.zeros(2, 1))
    assert {entry[1:] for entry in seen} == {(1, 2)}  # one item each, two of the four threads each
    assert torch.get_num_threads() == 4
    seen.clear()
    map_on_threads(work, torch.zeros(8, 1))
    assert {entry[1:] for entry in seen} == {(2, 1)}
    assert torch.get_num_threads() == 4
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [4]


@pytest.mark.usefixtures("no_gradients")
def test_threads_are_kept_whatever_the_sizes_of_the_batches() -> None:
    before = _pool.cache_info().misses
    for number in (2, 4, 5, 3, 9, 2, 8, 3, 7, 2, 4):
        map_on_threads(lambda part: part, torch.zeros(number, 1))
    assert _pool.cache_info().misses - before <= 2  # two with two threads of torch each, four with one


@pytest.mark.usefixtures("no_gradients")
def test_one_item_is_computed_where_it_is() -> None:
    names: list[str] = []

    def work(part: Tensor) -> Tensor:
        names.append(threading.current_thread().name)
        return part

    map_on_threads(work, torch.zeros(1, 1))
    assert names == [threading.current_thread().name]


@pytest.fixture
def no_gradients() -> object:
    with torch.no_grad():
        yield


def test_modes_of_the_caller_hold_on_the_threads() -> None:
    weight = torch.ones(1, requires_grad=True)
    for mode, expected in ((torch.inference_mode, (True, False)), (torch.no_grad, (False, False))):
        with mode():
            found = map_on_threads(lambda part: part * weight, torch.ones(4, 1))
            assert (found.is_inference(), found.requires_grad) == expected


def test_what_belongs_to_the_callers_thread_alone_still_sees_the_operations() -> None:
    weight = torch.ones(1, 1, requires_grad=True)
    found = map_on_threads(lambda part: part @ weight, torch.ones(4, 1))
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == 4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert map_on_threads(lambda part: part @ weight, torch.ones(4, 1)).dtype == torch.bfloat16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        map_on_threads(lambda part: part @ weight, torch.ones(4, 1))
    assert counter.get_total_flops() == 8


@pytest.mark.usefixtures("no_gradients")
def test_an_error_reaches_the_caller() -> None:
    def fail(part: Tensor) -> Tensor:
        raise ValueError(f"{len(part)} items too many")

    with pytest.raises(ValueError, match="1 items too many"):
        map_on_threads(fail, torch.zeros(4, 1))
    assert torch.equal(map_on_threads(torch.neg, torch.ones(4, 1)), -torch.ones(4, 1))


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_starts_threads_of_its_own() -> None:
    batch = torch.ones(4, 1)
    map_on_threads(torch.neg, batch)
    child = os.fork()
    if child == 0:  # no tensor arithmetic: OpenMP itself does not survive a fork
        os._exit(0 if torch.equal(map_on_threads(lambda part: part, batch), batch) else 1)
    assert os.waitpid(child, 0)[1] == 0
