"""`workers`: a few tasks, all work done, nothing left behind."""

from __future__ import annotations

import asyncio

import pytest

from asyncembed.sending.workers import Workers

pytestmark = pytest.mark.virtual_time


async def test_every_piece_and_what_is_left_of_it_is_done() -> None:
    done: list[int] = []

    async def step(piece: int) -> list[int]:
        await asyncio.sleep(1)
        done.append(piece)
        return [piece // 2, piece - piece // 2] if piece > 1 else []

    async with asyncio.TaskGroup() as group:
        workers = Workers(group, 3, step)
        await workers.put(5)
        await workers.put(1)
        await workers.close()

    assert sorted(done) == sorted([5, 2, 3, 1, 1, 1, 2, 1, 1, 1])


async def test_no_more_pieces_are_taken_than_there_are_tasks() -> None:
    started: list[int] = []
    go = asyncio.Event()

    async def step(piece: int) -> list[int]:
        started.append(piece)
        await go.wait()
        return []

    async def put_all(workers: Workers[int]) -> None:
        for piece in range(10):
            await workers.put(piece)
            handed_over.append(piece)
        await workers.close()

    handed_over: list[int] = []
    async with asyncio.TaskGroup() as group:
        group.create_task(put_all(Workers(group, 3, step)))
        await asyncio.sleep(1)
        assert (started, handed_over) == ([0, 1, 2], [0, 1, 2])
        go.set()
    assert started == list(range(10))


async def test_one_piece_starts_one_task() -> None:
    tasks: set[asyncio.Task[None] | None] = set()

    async def step(piece: int) -> list[int]:
        tasks.add(asyncio.current_task())
        return [piece - 1] if piece else []

    async with asyncio.TaskGroup() as group:
        workers = Workers(group, 8, step)
        await workers.put(5)
        await workers.close()

    assert len(tasks) == 1


async def test_what_a_step_raises_ends_all_of_them() -> None:
    cancelled: list[int] = []

    async def step(piece: int) -> list[int]:
        try:
            await asyncio.sleep(piece)
        except asyncio.CancelledError:
            cancelled.append(piece)
            raise
        raise ValueError(piece)

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            workers = Workers(group, 3, step)
            for piece in (3, 1, 2):
                await workers.put(piece)
            await workers.close()

    assert [str(error) for error in caught.value.exceptions] == ["1"]
    assert sorted(cancelled) == [2, 3]


async def test_work_left_over_goes_before_newer_work() -> None:
    done: list[str] = []

    async def step(piece: str) -> list[str]:
        done.append(piece)
        await asyncio.sleep(1)
        return ["a1", "a2"] if piece == "a" else []

    async with asyncio.TaskGroup() as group:
        workers = Workers(group, 1, step)

        async def put_all() -> None:
            for piece in ("a", "b"):
                await workers.put(piece)
            await workers.close()

        group.create_task(put_all())

    assert done == ["a", "a1", "a2", "b"]


async def test_a_task_that_is_aside_lets_another_one_work_up_to_so_many() -> None:
    started: list[int] = []
    go = asyncio.Event()

    async def step(piece: int) -> list[int]:
        started.append(piece)
        async with workers.aside():
            await go.wait()
        return []

    async with asyncio.TaskGroup() as group:
        workers = Workers(group, 1, step, spare=2)
        for piece in range(3):
            await workers.put(piece)
        putting = group.create_task(workers.put(3))
        await asyncio.sleep(1)
        assert (started, putting.done()) == ([0, 1, 2], False)
        go.set()
        await putting
        await workers.close()
    assert started == [0, 1, 2, 3]
