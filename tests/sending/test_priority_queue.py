"""`pacing.PriorityQueue`: urgent waiters go first, but cannot starve bulk waiters."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest

from asyncembed.sending.pacing import ConcurrencyLimiter, PriorityQueue, RateLimiter


class Waiters:
    """Waiters that queue for units, which the test supplies, and the order in which they were served."""

    def __init__(self) -> None:
        self.queue = PriorityQueue()
        self.units = 0
        self.served: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def add(
        self, name: str, *, cost: int = 1, urgent: bool = False, is_ready: Callable[[], bool] = lambda: True
    ) -> None:
        async def wait() -> None:
            await self.queue.wait(cost, lambda: 0.0 if self.units >= cost else math.inf, is_ready, urgent=urgent)
            self.units -= cost
            self.served.append(name)

        self._tasks[name] = asyncio.create_task(wait())
        await settle()

    async def supply(self, units: int) -> None:
        self.units += units
        self.queue.changed()
        await settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_waiters_of_one_class_are_first_in_first_out() -> None:
    waiters = Waiters()
    for name in "abc":
        await waiters.add(name)
    await waiters.supply(3)
    assert waiters.served == ["a", "b", "c"]
    assert len(waiters.queue) == 0


async def test_a_large_waiter_is_not_starved_by_small_ones_behind_it() -> None:
    waiters = Waiters()
    await waiters.add("large", cost=10)
    await waiters.add("small")
    await waiters.supply(9)
    assert waiters.served == []
    await waiters.supply(2)
    assert waiters.served == ["large", "small"]


async def test_an_urgent_waiter_goes_before_a_bulk_waiter() -> None:
    waiters = Waiters()
    await waiters.add("bulk", cost=5)
    await waiters.add("now", urgent=True)
    await waiters.supply(1)
    assert waiters.served == ["now"]


async def test_a_bulk_waiter_is_next_after_urgent_ones_have_taken_its_cost() -> None:
    waiters = Waiters()
    await waiters.add("bulk", cost=3)
    for number in range(6):
        await waiters.add(f"now {number}", urgent=True)
    await waiters.supply(3)
    assert waiters.served == ["now 0", "now 1", "now 2"]
    await waiters.supply(2)
    assert len(waiters.served) == 3  # the units are kept for the bulk waiter that was bypassed
    await waiters.supply(4)
    assert waiters.served == ["now 0", "now 1", "now 2", "bulk", "now 3", "now 4", "now 5"]


async def test_a_waiter_that_is_not_ready_is_passed_over_and_keeps_its_place() -> None:
    waiters = Waiters()
    is_ready = False
    await waiters.add("first", is_ready=lambda: is_ready)
    await waiters.add("second")
    await waiters.add("third")
    await waiters.supply(1)
    assert waiters.served == ["second"]
    is_ready = True
    await waiters.supply(1)
    assert waiters.served == ["second", "first"]


@pytest.mark.parametrize("cancelled", ["a", "b", "c"])
async def test_a_cancelled_waiter_leaves_the_queue(cancelled: str) -> None:
    waiters = Waiters()
    for name in "abc":
        await waiters.add(name)
    await waiters.cancel(cancelled)
    await waiters.supply(2)
    assert waiters.served == [name for name in "abc" if name != cancelled]
    assert waiters.units == 0


@pytest.mark.virtual_time
async def test_an_urgent_request_goes_before_a_bulk_one_that_waits_for_tokens() -> None:
    rate = RateLimiter()
    rate.limit(None, 60_000)
    slots = ConcurrencyLimiter(rate, 8)
    order: list[str] = []
    loop = asyncio.get_running_loop()
    began_at = loop.time()

    async def send(name: str, tokens: int, *, urgent: bool) -> None:
        async with slots.slot(tokens, urgent=urgent):
            order.append(f"{name} after {loop.time() - began_at:.0f} s")

    async with asyncio.TaskGroup() as group:
        group.create_task(send("bulk", 59_000, urgent=False))
        await asyncio.sleep(0)
        group.create_task(send("bulk", 40_000, urgent=False))
        await asyncio.sleep(0)
        group.create_task(send("now", 500, urgent=True))
    assert [line.split()[0] for line in order] == ["bulk", "now", "bulk"]
    assert order[1] == "now after 0 s"


async def test_an_embedder_without_a_free_slot_does_not_delay_another_one() -> None:
    rate = RateLimiter(answered=True)
    full, free = ConcurrencyLimiter(rate, 1), ConcurrencyLimiter(rate, 1)

    async def another() -> None:
        async with full.slot(1):
            assert full.in_flight == 1

    async with asyncio.TaskGroup() as group, full.slot(1):
        group.create_task(another())
        await settle()
        assert full.waiting == 1
        async with asyncio.timeout(1), free.slot(1):
            assert (full.in_flight, free.in_flight) == (1, 1)
    assert (full.in_flight, full.waiting, len(rate.queue)) == (0, 0, 0)
