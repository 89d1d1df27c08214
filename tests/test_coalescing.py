"""`coalescing` through `Embedder.embed_one`: concurrent calls share requests, and nobody pays for anybody else."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder
from asyncembed.errors import BadRequestError, DeadlineError, QuotaError, RejectedTextError, TransportError
from tests.fakes import FakeProvider, Script, vector_of

pytestmark = pytest.mark.virtual_time


def make(script: Script | None = None, **options: Any) -> tuple[Embedder, FakeProvider]:
    provider = FakeProvider(script)  # a request takes one second
    return Embedder("fake", provider=provider, **options), provider


def now() -> float:
    return asyncio.get_running_loop().time()


async def settled(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    await asyncio.wait(tasks)
    return [task.exception() if not task.cancelled() and task.exception() else None for task in tasks]


async def test_a_lone_call_is_sent_at_once() -> None:
    embedder, provider = make()
    began = now()
    np.testing.assert_array_equal(await embedder.embed_one("a"), vector_of("a"))
    assert provider.sent_at[0] - began < 1e-3


async def test_calls_of_one_moment_are_one_request_and_equal_texts_one_input() -> None:
    embedder, provider = make()
    texts = [f"text {number % 1_500}" for number in range(2_000)]

    tasks = [asyncio.create_task(embedder.embed_one(text)) for text in texts]
    await asyncio.wait(tasks)

    assert [len(sent) for sent in provider.requests] == [1_500]
    for text, task in zip(texts, tasks, strict=True):
        np.testing.assert_array_equal(task.result(), vector_of(text))


async def test_what_arrives_while_requests_are_under_way_travels_together() -> None:
    embedder, provider = make()
    tasks = []
    for number in range(100):  # one call every 0.1 s, for 10 s
        tasks.append(asyncio.create_task(embedder.embed_one(f"text {number}")))
        await asyncio.sleep(0.1)
    await asyncio.wait(tasks)

    assert all(task.exception() is None for task in tasks)
    # two at once, a second each
    assert len(provider.requests) <= 23
    assert provider.most_in_flight == 2


async def test_no_caller_waits_longer_than_the_request_under_way_and_its_own() -> None:
    embedder, _ = make()
    waits: list[float] = []

    async def call(number: int) -> None:
        began = now()
        await embedder.embed_one(f"text {number}")
        waits.append(now() - began)

    async with asyncio.TaskGroup() as group:
        for number in range(200):
            group.create_task(call(number))
            await asyncio.sleep(0.037)
    assert max(waits) <= 2.01


async def test_each_caller_has_a_vector_of_its_own() -> None:
    embedder, _ = make()
    one, other = [asyncio.create_task(embedder.embed_one("same")) for _ in range(2)]
    await asyncio.wait([one, other])
    one.result()[:] = 0
    np.testing.assert_array_equal(other.result(), vector_of("same"))


async def test_a_poison_fails_its_own_caller_alone() -> None:
    embedder, _ = make(lambda _, texts: BadRequestError("HTTP 400", status=400) if "poison" in texts else None)
    tasks = [asyncio.create_task(embedder.embed_one(text)) for text in ("a", "poison", "b", "poison")]

    errors = await settled(tasks)

    assert [type(error) for error in errors] == [type(None), RejectedTextError, type(None), RejectedTextError]
    assert errors[1] is not errors[3]


async def test_a_fatal_answer_reaches_every_caller_as_an_error_of_its_own() -> None:
    embedder, provider = make(lambda *_: QuotaError("no money", status=429))
    errors = await settled([asyncio.create_task(embedder.embed_one(f"text {n}")) for n in range(5)])
    assert all(isinstance(error, QuotaError) and error.status == 429 for error in errors)
    assert len({id(error) for error in errors}) == 5
    assert len(provider.requests) == 1


async def test_a_cancelled_caller_harms_nobody() -> None:
    embedder, provider = make()
    tasks = [asyncio.create_task(embedder.embed_one(text)) for text in ("a", "same", "same", "b")]
    await asyncio.sleep(0.5)

    tasks[0].cancel()
    tasks[1].cancel()
    await asyncio.wait(tasks)

    np.testing.assert_array_equal(tasks[2].result(), vector_of("same"))
    np.testing.assert_array_equal(tasks[3].result(), vector_of("b"))
    assert len(provider.requests) == 1


async def test_the_last_one_to_leave_ends_the_request() -> None:
    embedder, provider = make()
    tasks = [asyncio.create_task(embedder.embed_one(text)) for text in ("a", "b")]
    await asyncio.sleep(0.5)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)

    assert provider.in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    np.testing.assert_array_equal(await embedder.embed_one("a"), vector_of("a"))


async def test_who_asks_for_a_text_whose_request_is_being_ended_gets_a_new_one() -> None:
    embedder, provider = make()
    first = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.sleep(0.5)
    first.cancel()
    second = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.wait([first, second])
    np.testing.assert_array_equal(second.result(), vector_of("a"))
    assert len(provider.requests) == 2


async def test_a_text_that_nobody_wants_any_more_is_not_sent() -> None:
    embedder, provider = make()
    busy = [asyncio.create_task(embedder.embed_one(text)) for text in ("a",)]
    await asyncio.sleep(0.1)
    busy.append(asyncio.create_task(embedder.embed_one("b")))
    await asyncio.sleep(0.1)
    waiting = [asyncio.create_task(embedder.embed_one(text)) for text in ("c", "d")]
    await asyncio.sleep(0.1)
    waiting[0].cancel()
    await asyncio.wait([*busy, *waiting])
    assert [sent for sent in provider.requests if "c" in sent] == []


async def test_a_deadline_ends_one_call_and_no_other() -> None:
    embedder, _ = make()
    impatient = asyncio.create_task(embedder.embed_one("a", deadline=0.5))
    patient = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.wait([impatient, patient])
    assert isinstance(impatient.exception(), DeadlineError)
    np.testing.assert_array_equal(patient.result(), vector_of("a"))


async def test_closing_ends_what_is_under_way_with_an_error() -> None:
    embedder, provider = make()
    tasks = [asyncio.create_task(embedder.embed_one(f"text {n}")) for n in range(3)]
    await asyncio.sleep(0.5)
    await embedder.aclose()
    errors = await settled(tasks)
    assert all(isinstance(error, TransportError) for error in errors)
    assert provider.in_flight == 0


@pytest.mark.parametrize("seed", range(5))
async def test_calls_cancelled_at_random_leave_nothing_behind(seed: int) -> None:
    dice = random.Random(seed)
    embedder, provider = make()

    async def call(number: int) -> None:
        text = f"text {number % 300}"
        await asyncio.sleep(dice.uniform(0, 20))
        np.testing.assert_array_equal(await embedder.embed_one(text), vector_of(text))

    tasks = [asyncio.create_task(call(number)) for number in range(2_000)]
    for task in dice.sample(tasks, 1_000):
        asyncio.get_running_loop().call_later(dice.uniform(0, 25), task.cancel)
    errors = await settled(tasks)
    await asyncio.sleep(2)

    assert set(errors) == {None}
    assert provider.in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    coalescer = embedder._coalescers.get()
    assert (coalescer._all, coalescer._gathering, coalescer._requests) == ({}, {}, set())
