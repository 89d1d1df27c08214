"""`coalescing` through `Embedder`: concurrent small calls share requests, each with its own result, cost and end."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from asyncembed.errors import (
    BadRequestError,
    DeadlineError,
    OverloadedError,
    QuotaError,
    RateLimitedError,
    RejectedTextError,
    TransportError,
)
from tests.fakes import is_idle, make_embedder, now, vector_of

pytestmark = pytest.mark.virtual_time


async def settled(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    await asyncio.wait(tasks)
    return [task.exception() if not task.cancelled() and task.exception() else None for task in tasks]


async def test_a_lone_call_is_sent_at_once() -> None:
    embedder, provider = make_embedder()
    began = now()
    np.testing.assert_array_equal(await embedder.embed_one("a"), vector_of("a"))
    assert provider.sent_at[0] - began < 1e-3


async def test_simultaneous_calls_are_one_request_and_duplicate_texts_one_input() -> None:
    embedder, provider = make_embedder()
    texts = [f"text {number % 1_500}" for number in range(2_000)]

    tasks = [asyncio.create_task(embedder.embed_one(text)) for text in texts]
    await asyncio.wait(tasks)

    assert [len(sent) for sent in provider.requests] == [1_500]
    for text, task in zip(texts, tasks, strict=True):
        np.testing.assert_array_equal(task.result(), vector_of(text))


async def test_calls_made_while_requests_are_in_flight_share_the_next_request() -> None:
    embedder, provider = make_embedder()
    tasks = []
    for number in range(100):  # one call every 0.1 s, for 10 s
        tasks.append(asyncio.create_task(embedder.embed_one(f"text {number}")))
        await asyncio.sleep(0.1)
    await asyncio.wait(tasks)

    assert all(task.exception() is None for task in tasks)
    # two at a time, one second each
    assert len(provider.requests) <= 23
    assert provider.most_in_flight == 2


async def test_no_caller_waits_longer_than_for_the_request_in_flight_and_its_own() -> None:
    embedder, _ = make_embedder()
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


async def test_each_caller_gets_its_own_copy_of_a_vector() -> None:
    embedder, _ = make_embedder()
    one, other = [asyncio.create_task(embedder.embed_one("same")) for _ in range(2)]
    await asyncio.wait([one, other])
    one.result()[:] = 0
    np.testing.assert_array_equal(other.result(), vector_of("same"))


async def test_a_bad_text_fails_only_its_own_callers() -> None:
    embedder, _ = make_embedder(lambda _, texts: BadRequestError("HTTP 400", status=400) if "poison" in texts else None)
    tasks = [asyncio.create_task(embedder.embed_one(text)) for text in ("a", "poison", "b", "poison")]

    errors = await settled(tasks)

    assert [type(error) for error in errors] == [type(None), RejectedTextError, type(None), RejectedTextError]
    assert errors[1] is not errors[3]


async def test_each_caller_gets_its_own_copy_of_a_fatal_error() -> None:
    embedder, provider = make_embedder(lambda *_: QuotaError("no money", status=429))
    errors = await settled([asyncio.create_task(embedder.embed_one(f"text {n}")) for n in range(5)])
    assert all(isinstance(error, QuotaError) and error.status == 429 for error in errors)
    assert len({id(error) for error in errors}) == 5
    assert len(provider.requests) == 1


async def test_a_cancelled_call_does_not_affect_other_calls() -> None:
    embedder, provider = make_embedder()
    tasks = [asyncio.create_task(embedder.embed_one(text)) for text in ("a", "same", "same", "b")]
    await asyncio.sleep(0.5)

    tasks[0].cancel()
    tasks[1].cancel()
    await asyncio.wait(tasks)

    np.testing.assert_array_equal(tasks[2].result(), vector_of("same"))
    np.testing.assert_array_equal(tasks[3].result(), vector_of("b"))
    assert len(provider.requests) == 1


async def test_a_shared_request_is_cancelled_with_its_last_call() -> None:
    embedder, provider = make_embedder()
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


async def test_a_text_whose_request_is_being_cancelled_is_sent_again() -> None:
    embedder, provider = make_embedder()
    first = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.sleep(0.5)
    first.cancel()
    second = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.wait([first, second])
    np.testing.assert_array_equal(second.result(), vector_of("a"))
    assert len(provider.requests) == 2


async def test_the_queued_text_of_a_cancelled_call_is_not_sent() -> None:
    embedder, provider = make_embedder()
    busy = [asyncio.create_task(embedder.embed_one(text)) for text in ("a",)]
    await asyncio.sleep(0.1)
    busy.append(asyncio.create_task(embedder.embed_one("b")))
    await asyncio.sleep(0.1)
    waiting = [asyncio.create_task(embedder.embed_one(text)) for text in ("c", "d")]
    await asyncio.sleep(0.1)
    waiting[0].cancel()
    await asyncio.wait([*busy, *waiting])
    assert [sent for sent in provider.requests if "c" in sent] == []


async def test_a_deadline_ends_only_its_own_call() -> None:
    embedder, _ = make_embedder()
    impatient = asyncio.create_task(embedder.embed_one("a", deadline=0.5))
    patient = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.wait([impatient, patient])
    assert isinstance(impatient.exception(), DeadlineError)
    np.testing.assert_array_equal(patient.result(), vector_of("a"))


async def test_closing_waits_for_queued_calls() -> None:
    embedder, provider = make_embedder(max_batch_size=2)
    tasks = [
        asyncio.create_task(embedder.embed_one(f"text {n}")) for n in range(6)
    ]  # three requests, two of them at a time
    await asyncio.sleep(0.5)
    await embedder.aclose()
    assert await settled(tasks) == [None] * 6
    assert provider.in_flight == 0


@pytest.mark.parametrize("grace", [0.0, 1.2])
async def test_calls_that_take_longer_than_the_grace_of_closing_fail(grace: float) -> None:
    embedder, provider = make_embedder(max_batch_size=2)
    tasks = [asyncio.create_task(embedder.embed_one(f"text {n}")) for n in range(6)]
    await asyncio.sleep(0.5)
    began = now()
    await embedder.aclose(grace)
    errors = await settled(tasks)
    assert now() - began == pytest.approx(grace, abs=1e-3)
    assert [type(error) for error in errors[-2:]] == [TransportError] * 2
    assert errors[:4] == [None] * 4 if grace else all(isinstance(error, TransportError) for error in errors)
    assert provider.in_flight == 0


async def test_small_embed_calls_and_embed_one_calls_share_requests() -> None:
    embedder, provider = make_embedder()
    small = [asyncio.create_task(embedder.embed([f"text {n}", "same", f"text {n}"])) for n in range(50)]
    single = [asyncio.create_task(embedder.embed_one("same")) for _ in range(50)]
    await asyncio.wait([*small, *single])

    assert [len(sent) for sent in provider.requests] == [51]
    for number, task in enumerate(small):
        wanted = [vector_of(f"text {number}"), vector_of("same"), vector_of(f"text {number}")]
        np.testing.assert_array_equal(task.result().embeddings, wanted)
    np.testing.assert_array_equal(single[-1].result(), vector_of("same"))


async def test_the_tokens_of_shared_requests_are_divided_among_their_callers() -> None:
    embedder, provider = make_embedder()
    tasks = [asyncio.create_task(embedder.embed([f"text {n}" * (n + 1), "same"])) for n in range(20)]
    results = [await task for task in tasks]
    alone = await embedder.embed(["another", "one"])

    assert sum(result.total_tokens for result in (*results, alone)) == provider.billed
    assert all(result.requests == 1 and result.retries == 0 for result in results)
    assert (alone.requests, len(provider.requests)) == (1, 2)


async def test_all_pieces_of_a_long_text_are_billed() -> None:
    embedder, provider = make_embedder(max_tokens_per_text=50, max_tokens_per_batch=50, too_long="mean")
    result = await embedder.embed(["x" * 1_000])
    assert len(provider.requests) == 20
    assert result.total_tokens == provider.billed == 1_000


async def test_the_cause_of_a_failure_reaches_each_caller() -> None:
    embedder, _ = make_embedder(lambda *_: BadRequestError("HTTP 400", status=400))
    with pytest.raises(RejectedTextError) as caught:
        await embedder.embed_one("a")
    assert isinstance(caught.value.__cause__, BadRequestError)


async def test_a_call_of_many_texts_is_not_queued() -> None:
    embedder, provider = make_embedder()
    busy = [asyncio.create_task(embedder.embed_one(f"text {n}")) for n in range(2)]
    await asyncio.sleep(0.1)
    busy.append(asyncio.create_task(embedder.embed_one("gathers")))
    await embedder.embed([f"bulk {n}" for n in range(100)])
    await asyncio.wait(busy)
    assert sorted(map(len, provider.requests)) == [1, 2, 100]


async def test_a_bad_text_in_a_small_call_fails_alone() -> None:
    embedder, _ = make_embedder(lambda _, texts: BadRequestError("HTTP 400", status=400) if "poison" in texts else None)
    one, other = [asyncio.create_task(embedder.embed(texts)) for texts in (["a", "poison"], ["b", "c"])]
    await asyncio.wait([one, other])
    assert one.result().failed_indices == [1]
    assert one.result().retries > 0
    assert other.result().failed_indices == []


async def test_a_cancelled_small_call_leaves_shared_texts_to_other_calls() -> None:
    embedder, provider = make_embedder()
    leaving = asyncio.create_task(embedder.embed(["a", "b"]))
    staying = asyncio.create_task(embedder.embed(["b", "c"]))
    await asyncio.sleep(0.5)
    leaving.cancel()
    await asyncio.wait([leaving, staying])
    np.testing.assert_array_equal(staying.result().embeddings, [vector_of("b"), vector_of("c")])
    assert len(provider.requests) == 1


async def test_a_small_call_keeps_its_finished_texts_at_the_deadline() -> None:
    embedder, _ = make_embedder(max_batch_size=3)
    busy = asyncio.create_task(embedder.embed_one("a"))
    other = asyncio.create_task(embedder.embed_one("b"))
    await asyncio.sleep(0.5)
    with pytest.raises(DeadlineError) as caught:
        await embedder.embed(["a", "late"], deadline=1.0)
    np.testing.assert_array_equal(caught.value.result.embeddings[0], vector_of("a"))
    assert caught.value.result.failed_indices == [1]
    await asyncio.wait([busy, other])


async def test_a_pause_beyond_the_deadline_of_a_call_ends_only_that_call() -> None:
    embedder, _ = make_embedder(
        lambda n, _: RateLimitedError("HTTP 429", status=429, retry_after_s=60.0) if n == 0 else None
    )
    began = now()
    impatient = asyncio.create_task(embedder.embed_one("a", deadline=10.0))
    patient = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.wait([impatient])
    assert isinstance(impatient.exception(), DeadlineError)
    assert now() - began == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_array_equal(await patient, vector_of("a"))


async def test_calls_beyond_max_waiting_are_refused_with_a_retry_after() -> None:
    embedder, provider = make_embedder(max_waiting=5)
    await embedder.embed_one("how long does it take")
    tasks = [asyncio.create_task(embedder.embed_one(f"text {n}")) for n in range(5)]
    await asyncio.sleep(0.1)
    with pytest.raises(OverloadedError, match="max_waiting=5") as caught:
        await embedder.embed_one("one too many")
    assert caught.value.retry_after_s == pytest.approx(1.0, rel=0.1)
    with pytest.raises(OverloadedError):
        await embedder.embed(["one", "too many"])
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    tasks.append(asyncio.create_task(embedder.embed_one("there is room again")))
    assert await settled(tasks) == [None] * 6
    assert not any("too many" in text for sent in provider.requests for text in sent)


async def test_a_hanging_request_does_not_delay_other_calls() -> None:
    embedder, provider = make_embedder(lambda _, texts: 300.0 if "hangs" in texts else None, concurrency=4)
    await embedder.embed_one("how long does it take")
    hanging = []
    for _ in range(2):
        hanging.append(asyncio.create_task(embedder.embed(["hangs", str(len(hanging))])))
        await asyncio.sleep(0.1)
    began = now()
    await embedder.embed_one("a")
    assert now() - began < 5.0
    assert provider.most_in_flight <= 4
    for task in hanging:
        task.cancel()
    await asyncio.wait(hanging)


async def test_single_calls_go_before_a_bulk_job() -> None:
    embedder, provider = make_embedder(max_batch_size=10, concurrency=2)
    bulk = asyncio.create_task(embedder.embed([f"bulk {n}" for n in range(400)]))  # 20 s
    await asyncio.sleep(3.5)
    began = now()
    await embedder.embed_one("a query")
    assert now() - began <= 1.51  # a request in flight, and its own
    assert not bulk.done()
    assert not (await bulk).failures
    assert provider.most_in_flight == 2


async def test_endless_single_calls_do_not_starve_a_bulk_job() -> None:
    embedder, _ = make_embedder(max_batch_size=10, concurrency=1)
    done = asyncio.Event()

    async def ask_on() -> None:
        number = 0
        while not done.is_set():
            number += 1
            await embedder.embed_one(f"query {number}")

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(ask_on())
        result = await embedder.embed([f"bulk {n}" for n in range(100)])
        done.set()
    assert not result.failures


@pytest.mark.parametrize("seed", range(5))
async def test_calls_cancelled_at_random_leave_nothing_behind(seed: int) -> None:
    dice = random.Random(seed)
    embedder, provider = make_embedder()

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
    assert is_idle(embedder)
