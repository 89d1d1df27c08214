"""`attempts.Admission`: how many batches of a call are in work, and which one is next."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from asyncembed.sending.attempts import Admission

pytestmark = pytest.mark.virtual_time


class Work:
    """Starts batches as they are admitted, and ends them when the test calls `end`."""

    def __init__(self, most: int, most_backing_off: int = 0) -> None:
        self.admission = Admission(most, most_backing_off)
        self.started: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, *names: str, is_part: bool = True) -> None:
        for name in names:
            self._tasks[name] = asyncio.create_task(self._start(name, is_part))
        await asyncio.sleep(0.1)

    async def end(self, *names: str) -> None:
        for name in names:
            self.admission.leave()
            self.started.remove(name)
        await asyncio.sleep(0.1)

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.sleep(0.1)

    async def _start(self, name: str, is_part: bool) -> None:
        await self.admission.enter(is_part=is_part)
        self.started.append(name)


async def test_no_more_batches_are_admitted_than_there_is_room_for() -> None:
    work = Work(3)
    await work.add("a", "b", "c", "d")
    assert work.started == ["a", "b", "c"]
    await work.end("b")
    assert work.started == ["a", "c", "d"]


async def test_the_latest_part_goes_first() -> None:
    work = Work(1)
    await work.add("a", "older", "newer")
    await work.end("a")
    assert work.started == ["newer"]
    await work.end("newer")
    assert work.started == ["older"]


async def test_a_new_batch_waits_for_all_parts() -> None:
    work = Work(1)
    await work.add("a", "part")
    await work.add("new batch", is_part=False)
    await work.add("later part")
    for first, second in pairwise(["a", "later part", "part", "new batch"]):
        await work.end(first)
        assert work.started == [second]


async def test_a_batch_that_backs_off_makes_room_for_another() -> None:
    work = Work(1, most_backing_off=1)
    await work.add("a", "b", "c")
    with work.admission.backing_off():
        await asyncio.sleep(0.1)
        assert work.started == ["a", "c"]
    await work.end("a")
    assert work.started == ["c"]  # "c" now holds the only place
    await work.end("c")
    assert work.started == ["b"]


async def test_batches_that_back_off_make_room_only_up_to_a_limit() -> None:
    work = Work(2, most_backing_off=1)
    await work.add("a", "b", "c", "d")
    with work.admission.backing_off(), work.admission.backing_off():
        await asyncio.sleep(0.1)
        assert work.started == ["a", "b", "d"]


async def test_a_cancelled_waiter_takes_no_place() -> None:
    work = Work(1)
    await work.add("a", "b", "c")
    await work.cancel("c")
    await work.end("a")
    assert work.started == ["b"]


async def test_a_waiter_that_is_cancelled_after_its_admission_gives_its_place_back() -> None:
    work = Work(1)
    await work.add("a", "b", "c")
    work.admission.leave()  # "c" is admitted, but its task has not run yet
    work.started.remove("a")
    await work.cancel("c")
    assert work.started == ["b"]
