"""`pacing.PriorityQueue`: urgent waiters go first, but cannot starve bulk waiters."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest

from asyncembed.sending.pacing import ConcurrencyLimiter, PriorityQueue, RateLimiter


class Till:
    """A queue in front of units that are handed out by the test, and a record of who got them."""

    def __init__(self) -> None:
        self.queue = PriorityQueue()
        self.units = 0
        self.served: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def line_up(
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

    async def send_away(self, name: str) -> None:
        self._tasks[name].cancel()
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_waiters_of_one_class_are_first_in_first_out() -> None:
    till = Till()
    for name in "abc":
        await till.line_up(name)
    await till.supply(3)
    assert till.served == ["a", "b", "c"]
    assert len(till.queue) == 0


async def test_a_large_waiter_is_not_starved_by_small_ones_behind_it() -> None:
    till = Till()
    await till.line_up("large", cost=10)
    await till.line_up("small")
    await till.supply(9)
    assert till.served == []
    await till.supply(2)
    assert till.served == ["large", "small"]


async def test_an_urgent_waiter_goes_before_a_bulk_waiter() -> None:
    till = Till()
    await till.line_up("bulk", cost=5)
    await till.line_up("now", urgent=True)
    await till.supply(1)
    assert till.served == ["now"]


async def test_a_bulk_waiter_is_next_after_urgent_ones_have_taken_its_cost() -> None:
    till = Till()
    await till.line_up("bulk", cost=3)
    for number in range(6):
        await till.line_up(f"now {number}", urgent=True)
    await till.supply(3)
    assert till.served == ["now 0", "now 1", "now 2"]
    await till.supply(2)
    assert len(till.served) == 3  # what there is, is kept for the one that was overtaken
    await till.supply(4)
    assert till.served == ["now 0", "now 1", "now 2", "bulk", "now 3", "now 4", "now 5"]


async def test_a_waiter_that_is_not_ready_is_passed_over_and_keeps_its_place() -> None:
    till = Till()
    is_ready = False
    await till.line_up("first", is_ready=lambda: is_ready)
    await till.line_up("second")
    await till.line_up("third")
    await till.supply(1)
    assert till.served == ["second"]
    is_ready = True
    await till.supply(1)
    assert till.served == ["second", "first"]


@pytest.mark.parametrize("leaving", ["a", "b", "c"])
async def test_a_cancelled_waiter_leaves_the_queue(leaving: str) -> None:
    till = Till()
    for name in "abc":
        await till.line_up(name)
    await till.send_away(leaving)
    await till.supply(2)
    assert till.served == [name for name in "abc" if name != leaving]
    assert till.units == 0


@pytest.mark.virtual_time
async def test_an_urgent_request_goes_before_a_bulk_one_that_waits_for_tokens() -> None:
    pace = RateLimiter()
    pace.limit(None, 60_000)
    slots = ConcurrencyLimiter(pace, 8)
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
    pace = RateLimiter(answered=True)
    full, free = ConcurrencyLimiter(pace, 1), ConcurrencyLimiter(pace, 1)

    async def another() -> None:
        async with full.slot(1):
            assert full.in_flight == 1

    async with asyncio.TaskGroup() as group, full.slot(1):
        group.create_task(another())
        await settle()
        assert full.waiting == 1
        async with asyncio.timeout(1), free.slot(1):
            assert (full.in_flight, free.in_flight) == (1, 1)
    assert (full.in_flight, full.waiting, len(pace.queue)) == (0, 0, 0)
