"""`Embedder`: its options, `embed_one`, `stream` and `plan`. What it sends is tested in `test_engine`."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder, Record
from asyncembed.batching.batch import Outcome
from asyncembed.batching.texts import Text
from asyncembed.embedder.results import WORTH_A_THREAD_BYTES, Results
from asyncembed.errors import (
    BadRequestError,
    ConfigError,
    DeadlineError,
    InvalidRecordError,
    InvalidTextError,
    ProviderDownError,
    QuotaError,
    RejectedTextError,
    WrongTypeError,
)
from asyncembed.report import Progress
from asyncembed.sending.context import CallContext
from asyncembed.types import Reply
from tests.fakes import FakeProvider, Script, vector_of


def make(script: Script | None = None, **options: Any) -> tuple[Embedder, FakeProvider]:
    provider = FakeProvider(script, latency_s=0)
    return Embedder("fake", provider=provider, **options), provider


# ---- options and arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"max_batch_size": 0}, "max_batch_size=0; it must be 1 to 2,048", id="no inputs"),
        pytest.param({"max_batch_size": 2_049}, "max_batch_size=2,049; it must be 1 to 2,048", id="too many inputs"),
        pytest.param({"max_batch_size": True}, "max_batch_size=True", id="a bool is no number"),
        pytest.param({"max_batch_size": 1.5}, "max_batch_size=1.5", id="a fraction"),
        pytest.param({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0", id="no tokens a batch"),
        pytest.param({"max_tokens_per_text": -1}, "max_tokens_per_text=-1", id="negative tokens"),
        pytest.param({"concurrency": 0}, "concurrency=0", id="no slot"),
        pytest.param({"dimensions": 0}, "dimensions=0", id="no dimensions"),
        pytest.param({"max_retries": -1}, "max_retries=-1", id="negative retries"),
        pytest.param({"timeout": 0}, "timeout=0", id="no time"),
        pytest.param({"timeout": float("nan")}, "timeout=nan", id="no number"),
        pytest.param({"tokens_per_minute": 0}, "tokens_per_minute=0", id="no rate"),
        pytest.param({"too_long": "chop"}, "too_long='chop'", id="an unknown policy"),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**options)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_ada_does_not_shorten_its_vectors() -> None:
    with pytest.raises(ConfigError, match="does not shorten"):
        Embedder("text-embedding-ada-002", dimensions=256, api_key="none")


def test_a_missing_key_is_said_when_the_embedder_is_made() -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        Embedder("text-embedding-3-small")


@pytest.mark.parametrize(
    ("texts", "kind", "words"),
    [
        pytest.param("text", TypeError, "one str", id="a str"),
        pytest.param(b"text", TypeError, "one bytes", id="bytes"),
        pytest.param({"a", "b"}, TypeError, "no order", id="a set"),
        pytest.param({"a": 1}, TypeError, "no order", id="a dict"),
        pytest.param([], ValueError, "empty", id="an empty list"),
        pytest.param(["a", ""], InvalidTextError, "text 1 is empty", id="an empty text"),
        pytest.param(["a", None], WrongTypeError, "text 1 is NoneType", id="None"),
        pytest.param(["a", "b", 5], TypeError, "text 2 is int", id="a number"),
        pytest.param(["a", b"b"], ValueError, "text 1 is bytes", id="bytes among texts"),
        pytest.param(["a\ud800"], InvalidTextError, "text 0 has a lone surrogate at character 1", id="a surrogate"),
    ],
)
async def test_wrong_arguments_are_named_and_nothing_is_sent(texts: Any, kind: type[Exception], words: str) -> None:
    embedder, provider = make()
    with pytest.raises(kind) as caught:
        await embedder.embed(texts)
    assert words in str(caught.value)
    assert provider.requests == []


async def test_a_generator_and_an_array_of_texts_are_lists_too() -> None:
    embedder, _ = make()
    from_generator = await embedder.embed(text for text in ("a", "b"))
    from_array = await embedder.embed(np.array(["a", "b"]))
    np.testing.assert_array_equal(from_generator.embeddings, from_array.embeddings)


async def test_special_tokens_newlines_and_spaces_are_sent_as_they_are() -> None:
    embedder, provider = make()
    texts = ["<|endoftext|>", "two\nlines", "  spaces  ", "\t", "nul\0"]
    await embedder.embed(texts)
    assert provider.requests == [texts]


# ---- results


async def test_a_result_tells_what_failed_and_has_no_vector_for_it() -> None:
    embedder, _ = make(lambda _, texts: BadRequestError("HTTP 400", status=400) if "bad" in texts else None)

    result = await embedder.embed(["a", "bad", "b"])

    assert result.embeddings.dtype == np.float32
    assert result.embeddings.shape == (3, 4)
    assert result.embeddings.flags.c_contiguous
    assert result.failed_indices == [1]
    assert result[1] is None
    np.testing.assert_array_equal(result[2], vector_of("b"))
    assert np.isnan(result.embeddings[1]).all()
    assert result.total_tokens == len("a") + len("b")


async def test_progress_ends_at_the_total() -> None:
    embedder, _ = make(max_batch_size=10)
    seen: list[Progress] = []
    await embedder.embed([f"text {n}" for n in range(95)], on_progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].requests) == (95, 95, 10)
    assert "95 of 95" in str(seen[-1])


async def test_embed_one_gives_a_vector_or_its_error() -> None:
    embedder, _ = make(lambda _, texts: BadRequestError("HTTP 400", status=400) if "bad" in texts else None)
    np.testing.assert_array_equal(await embedder.embed_one("a"), vector_of("a"))
    with pytest.raises(RejectedTextError):
        await embedder.embed_one("bad")
    with pytest.raises(InvalidTextError):
        await embedder.embed_one("")
    with pytest.raises(WrongTypeError):
        await embedder.embed_one(["a"])  # type: ignore[arg-type]


def test_one_embedder_serves_one_loop_after_another() -> None:
    embedder, provider = make(concurrency=2, max_batch_size=1)
    for _ in range(3):
        result = asyncio.run(embedder.embed([f"text {n}" for n in range(20)]))
        assert result.failures == ()
    assert len(provider.requests) == 60


def test_event_loops_that_are_closed_are_forgotten() -> None:
    embedder, _ = make(concurrency=1, max_batch_size=1)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def use() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        async with asyncio.TaskGroup() as group:  # at once, so that its locks are waited for, and know their loop
            for number in range(5):
                group.create_task(embedder.embed([f"text {number}", "x" * 3_000]))
                group.create_task(embedder.embed_one(f"text {number}"))

    for _ in range(4):
        asyncio.run(use())
    gc.collect()
    assert [loop() is None for loop in loops] == [True, True, True, False]


def test_one_embedder_serves_several_threads_with_a_loop_each() -> None:
    embedder, provider = make(concurrency=2, max_batch_size=1)
    errors: list[BaseException] = []

    def work(name: int) -> None:
        async def use() -> None:
            texts = [f"text {name} {number}" for number in range(50)]
            result = await embedder.embed(texts)
            for index, text in enumerate(texts):
                np.testing.assert_array_equal(result[index], vector_of(text))

        try:
            asyncio.run(use())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(provider.requests) == 200


async def test_a_provider_need_not_be_hashable() -> None:
    class Unhashable(FakeProvider):
        __hash__ = None  # type: ignore[assignment]

    embedder = Embedder("fake", provider=Unhashable(latency_s=0))
    assert (await embedder.embed(["a"])).failures == ()


async def test_two_replies_that_come_at_once_go_into_one_array() -> None:
    small_is_there = threading.Event()

    class Slow(Results):
        def _copy(self, embeddings: Any, outcome: Outcome) -> None:
            if len(outcome.texts) > 1:  # in a thread
                assert small_is_there.wait(10)
            super()._copy(embeddings, outcome)

    count = WORTH_A_THREAD_BYTES // 16 + 10
    results = Slow(count, CallContext(), None)
    vectors = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
    texts = [Text("", [index]) for index in range(count)]

    async with asyncio.TaskGroup() as group:
        group.create_task(results.deliver(Outcome(texts[1:], vectors[1:])))
        await asyncio.sleep(0)
        await results.deliver(Outcome(texts[:1], vectors[:1]))
        small_is_there.set()

    np.testing.assert_array_equal(results.finish(None, None, None).embeddings, vectors)


def test_the_repr_shows_no_key() -> None:
    embedder = Embedder("text-embedding-3-small", api_key="sk-canary")
    assert "canary" not in repr(embedder)
    assert "text-embedding-3-small" in repr(embedder)


# ---- stream


async def ids(items: AsyncIterator[Any]) -> list[Any]:
    return [item.record.id async for item in items]


def numbered(count: int) -> Iterator[tuple[int, str]]:
    return ((number, f"text {number}") for number in range(count))


async def test_a_stream_keeps_the_order_of_its_source_and_fails_bad_records_alone() -> None:
    embedder, _ = make(
        lambda _, texts: BadRequestError("HTTP 400", status=400) if "poison" in texts else None, max_batch_size=3
    )
    source: list[Any] = [("a", "x"), "plain text", Record("b", ""), None, {"id": "p", "text": "poison"}, ("c", "z")]

    items = [item async for item in embedder.stream(source)]

    assert [item.record.id for item in items] == ["a", 1, "b", 3, "p", "c"]
    kinds = [type(item.error) for item in items]
    assert kinds == [type(None), type(None), InvalidTextError, InvalidRecordError, RejectedTextError, type(None)]
    for item, text in zip(items, ["x", "plain text", None, None, None, "z"], strict=True):
        if text is None:
            assert item.vector is None
        else:
            np.testing.assert_array_equal(item.vector, vector_of(text))


@pytest.mark.virtual_time
async def test_a_stream_keeps_its_order_when_answers_do_not() -> None:
    provider = FakeProvider()
    answer = provider.embed

    async def slower_at_first(texts: Sequence[str]) -> Any:
        await asyncio.sleep(100 / (1 + len(provider.requests)))
        return await answer(texts)

    provider.embed = slower_at_first  # type: ignore[method-assign]
    embedder = Embedder("fake", provider=provider, max_batch_size=10, concurrency=4)

    assert await ids(embedder.stream(numbered(500))) == list(range(500))


@pytest.mark.virtual_time
async def test_a_stream_reads_only_so_far_ahead_of_its_reader() -> None:
    read = 0

    def source() -> Iterator[tuple[int, str]]:
        nonlocal read
        for item in numbered(100_000):
            read += 1
            yield item

    embedder = Embedder("fake", provider=FakeProvider(), max_batch_size=10, concurrency=2)
    async with aclosing(embedder.stream(source())) as items:
        async for item in items:
            await asyncio.sleep(1)
            assert read - item.record.id <= 2 * 3 * 10  # (concurrency + 1) batches, and a slice of as many
            if item.record.id == 300:
                break
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_a_stream_hands_out_what_it_has_when_its_source_falls_silent() -> None:
    received = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "a"
        await received.wait()
        yield "b"

    embedder = Embedder("fake", provider=FakeProvider())
    seen = []
    async for item in embedder.stream(source()):
        seen.append(item.record.text)
        received.set()
    assert seen == ["a", "b"]


@pytest.mark.virtual_time
async def test_leaving_a_stream_early_ends_its_requests_and_closes_its_source() -> None:
    closed = False

    async def source() -> AsyncIterator[str]:
        nonlocal closed
        try:
            for number in range(1_000_000):
                yield f"text {number}"
        finally:
            closed = True

    provider = FakeProvider()
    embedder = Embedder("fake", provider=provider, max_batch_size=10)
    async with aclosing(embedder.stream(source())) as items:
        async for _ in items:
            break
    assert closed
    assert provider.in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_fatal_answer_ends_a_stream_after_all_that_was_read() -> None:
    embedder, _ = make(
        lambda number, _: QuotaError("no money", status=429) if number == 2 else None,
        max_batch_size=10,
        concurrency=1,
    )
    done: list[Any] = []
    with pytest.raises(QuotaError):
        async for item in embedder.stream(numbered(100)):
            done.append(item)  # noqa: PERF401  # what came before the error is what is tested
    assert [item.record.id for item in done] == list(range(len(done)))
    assert sum(item.vector is not None for item in done) == 20


SOURCE_ERRORS = [
    KeyError("the source broke"),
    TimeoutError("the source's own"),
    ExceptionGroup("the source's own", [ValueError(1), KeyError(2)]),
    DeadlineError("of another call"),
]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("error", SOURCE_ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_of_the_source_is_raised_as_it_is_after_what_came_before_it(
    error: Exception, is_async: bool
) -> None:
    def source() -> Iterator[str]:
        yield from ("a", "b", "c")
        raise error

    async def async_source() -> AsyncIterator[str]:
        for text in source():
            yield text

    embedder, _ = make(max_batch_size=2)
    seen = []
    with pytest.raises(type(error)) as caught:
        async for item in embedder.stream(async_source() if is_async else source(), deadline=60):
            seen.append(item.record.text)  # noqa: PERF401  # what came before the error is what is tested
    assert caught.value is error
    assert seen == ["a", "b", "c"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.virtual_time
async def test_a_stream_ends_at_its_deadline_after_what_was_done() -> None:
    embedder = Embedder("fake", provider=FakeProvider(), max_batch_size=1, concurrency=1)
    seen = []
    with pytest.raises(DeadlineError):
        async for item in embedder.stream(numbered(100), deadline=3.5):
            seen.append(item.record.id)  # noqa: PERF401  # as above
    assert seen == [0, 1, 2]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_vector_of_a_stream_keeps_no_other_in_memory() -> None:
    embedder, _ = make()
    async for item in embedder.stream(numbered(10)):
        assert item.vector is not None
        assert item.vector.base is None


@pytest.mark.parametrize("source", ["text", b"text", {"id": 1}, {"a", "b"}])
async def test_a_stream_of_something_without_order_is_refused(source: Any) -> None:
    embedder, _ = make()
    with pytest.raises(TypeError):
        await ids(embedder.stream(source))


# ---- plan


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {}),
        (2_048, {}),
        (2_049, {}),
        (5_000, {}),
        (300, {"max_batch_size": 100}),
        (900, {"max_tokens_per_batch": 100}),
    ],
)
async def test_a_plan_foresees_the_requests_that_are_sent(count: int, options: dict[str, int]) -> None:
    embedder, provider = make(**options)
    texts = [f"text {number}" for number in range(count)]

    plan = await embedder.plan(texts)
    assert provider.requests == []
    result = await embedder.embed(texts)

    assert plan.requests == result.requests
    assert (plan.texts, plan.failures) == (count, ())


async def test_a_plan_counts_tokens_price_time_and_what_would_fail() -> None:
    embedder = Embedder(
        "text-embedding-3-small", api_key="none", tokens_per_minute=60, requests_per_minute=6, max_tokens_per_text=100
    )
    plan = await embedder.plan(["hello world", ("id", "hello world"), "", "long " * 200, None, "hello there world"])

    assert plan.exact
    assert plan.tokens == 2 + 3
    assert plan.cost_usd == pytest.approx(5 * 0.02 / 1e6)
    assert plan.seconds == pytest.approx(10)  # one request at 6 a minute
    assert [failure.index for failure in plan.failures] == [2, 3, 4]
    assert "5 tokens" in str(plan)


async def test_a_plan_of_nothing_is_nothing() -> None:
    embedder, _ = make()
    plan = await embedder.plan([])
    assert (plan.texts, plan.requests, plan.tokens) == (0, 0, 0)


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("vectors", "why"),
    [
        pytest.param(np.zeros((2, 4), np.float32), r"float32\[3, d\], got \(2, 4\)", id="one too few"),
        pytest.param(np.zeros(4, np.float32), r"got \(4,\)", id="one alone"),
        pytest.param(np.zeros((3, 4)), "of float32, got float64", id="float64"),
        pytest.param(np.full((3, 4), np.nan, np.float32), "finite", id="no numbers"),
        pytest.param([[0.0] * 4] * 3, "got list", id="lists"),
    ],
)
async def test_what_a_provider_of_ones_own_replies_is_looked_at(vectors: Any, why: str) -> None:
    class Careless:
        async def embed(self, texts: Sequence[str]) -> Reply:
            return Reply(vectors, 1)

    with pytest.raises(ProviderDownError, match=why) as caught:
        await Embedder("fake", provider=Careless(), max_retries=1).embed([f"text {n}" for n in range(3)])
    assert len(caught.value.result.failures) == 3


async def test_a_small_call_goes_on_while_all_threads_wait_for_it() -> None:
    embedder = Embedder("fake", provider=FakeProvider(latency_s=0))
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))

    def wait_in_a_thread() -> int:
        return len(asyncio.run_coroutine_threadsafe(embedder.embed(["a", "b"]), loop).result(10).embeddings)

    assert await asyncio.to_thread(wait_in_a_thread) == 2
