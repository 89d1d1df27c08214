"""`concurrency.task_group`: the error of a task is raised itself, not in a group."""

from __future__ import annotations

import asyncio

import pytest

from asyncembed.concurrency import task_group
from tests.fakes import now

pytestmark = pytest.mark.virtual_time


async def fail(error: BaseException, after_s: float) -> None:
    await asyncio.sleep(after_s)
    raise error


@pytest.mark.parametrize(
    "error",
    [KeyError("one"), TimeoutError("slow"), ExceptionGroup("its own", [KeyError("one"), KeyError("two")])],
    ids=["one", "a timeout", "a group"],
)
async def test_the_first_error_of_a_task_is_raised_itself_and_ends_the_others(error: Exception) -> None:
    began = now()
    with pytest.raises(type(error)) as caught:
        async with task_group() as group:
            group.create_task(fail(LookupError("later"), 2))
            group.create_task(fail(error, 1))
    assert caught.value is error
    assert now() - began == pytest.approx(1, abs=1e-3)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_an_error_of_the_body_is_raised_itself_and_ends_the_tasks() -> None:
    error = ExceptionGroup("its own", [KeyError("one")])
    with pytest.raises(ExceptionGroup) as caught:
        async with task_group() as group:
            group.create_task(asyncio.sleep(100))
            raise error
    assert caught.value is error
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_cancelled_group_ends_its_tasks_and_raises_a_cancelled_error() -> None:
    async def work() -> None:
        async with task_group() as group:
            group.create_task(asyncio.sleep(100))

    task = asyncio.create_task(work())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_group_without_errors_waits_for_its_tasks() -> None:
    began = now()
    async with task_group() as group:
        task = group.create_task(asyncio.sleep(3, "done"))
    assert (task.result(), round(now() - began)) == ("done", 3)
