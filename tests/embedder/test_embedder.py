"""`Embedder`: its options and arguments, its calls side by side, and its event loops."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from asyncembed import Embedder
from asyncembed.errors import (
    AllFailedError,
    BadRequestError,
    ConfigError,
    InvalidTextError,
    RejectedTextError,
    WrongTypeError,
)
from tests.fakes import FakeProvider, assert_vectors, make_embedder, now, texts, vector_of

make = partial(make_embedder, latency_s=0)


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


def test_dimensions_are_refused_for_a_model_that_cannot_shorten_vectors() -> None:
    with pytest.raises(ConfigError, match="does not shorten"):
        Embedder("text-embedding-ada-002", dimensions=256, api_key="none")


def test_a_missing_key_is_reported_when_the_embedder_is_made() -> None:
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


async def test_a_generator_and_an_array_of_texts_are_accepted() -> None:
    embedder, _ = make()
    from_generator = await embedder.embed(text for text in ("a", "b"))
    from_array = await embedder.embed(np.array(["a", "b"]))
    np.testing.assert_array_equal(from_generator.embeddings, from_array.embeddings)


async def test_special_tokens_newlines_and_spaces_are_sent_unchanged() -> None:
    embedder, provider = make()
    texts = ["<|endoftext|>", "two\nlines", "  spaces  ", "\t", "nul\0"]
    await embedder.embed(texts)
    assert provider.requests == [texts]


def test_the_repr_shows_no_key() -> None:
    embedder = Embedder("text-embedding-3-small", api_key="sk-canary")
    assert "canary" not in repr(embedder)
    assert "text-embedding-3-small" in repr(embedder)


async def test_a_provider_need_not_be_hashable() -> None:
    class Unhashable(FakeProvider):
        __hash__ = None  # type: ignore[assignment]

    embedder = Embedder("fake", provider=Unhashable(latency_s=0))
    assert (await embedder.embed(["a"])).failures == ()


# ---- calls


async def test_embed_one_returns_a_vector_or_raises_the_error_of_its_text() -> None:
    embedder, _ = make(lambda _, texts: BadRequestError("HTTP 400", status=400) if "bad" in texts else None)
    np.testing.assert_array_equal(await embedder.embed_one("a"), vector_of("a"))
    with pytest.raises(RejectedTextError):
        await embedder.embed_one("bad")
    with pytest.raises(InvalidTextError):
        await embedder.embed_one("")
    with pytest.raises(WrongTypeError):
        await embedder.embed_one(["a"])  # type: ignore[arg-type]


@pytest.mark.virtual_time
async def test_duplicate_texts_are_sent_once_and_fill_all_their_rows() -> None:
    embedder, provider = make_embedder()

    result = await embedder.embed(["a", "b", "a", "a", "b"])

    assert provider.requests == [["a", "b"]]
    assert_vectors(result.embeddings, ["a", "b", "a", "a", "b"])


@pytest.mark.virtual_time
async def test_an_error_with_all_reasons_is_raised_if_all_texts_fail() -> None:
    embedder, _ = make_embedder(lambda *_: BadRequestError("HTTP 400: no", status=400))

    with pytest.raises(AllFailedError) as caught:
        await embedder.embed(["a", "b"])

    assert isinstance(caught.value, RuntimeError)
    assert [failure.index for failure in caught.value.result.failures] == [0, 1]


@pytest.mark.virtual_time
async def test_two_calls_share_the_slots_of_their_embedder() -> None:
    embedder, provider = make_embedder(concurrency=4, max_batch_size=1)

    async with asyncio.TaskGroup() as group:
        group.create_task(embedder.embed(texts(10)))
        group.create_task(embedder.embed(texts(10)))

    assert provider.most_in_flight == 4


@pytest.mark.virtual_time
async def test_a_small_call_does_not_wait_for_the_end_of_a_large_one() -> None:
    embedder, _ = make_embedder(concurrency=4, max_batch_size=1)
    async with asyncio.TaskGroup() as group:
        large = group.create_task(embedder.embed(texts(400)))
        await asyncio.sleep(10.5)
        began = now()
        await embedder.embed(["small"])
        # behind the four requests in flight and the batches that already wait for a slot
        assert now() - began <= 3.5
        assert not large.done()


async def test_a_small_call_is_answered_while_all_threads_are_busy() -> None:
    embedder = Embedder("fake", provider=FakeProvider(latency_s=0))
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))

    def wait_in_a_thread() -> int:
        return len(asyncio.run_coroutine_threadsafe(embedder.embed(["a", "b"]), loop).result(10).embeddings)

    assert await asyncio.to_thread(wait_in_a_thread) == 2


# ---- event loops


def test_one_embedder_serves_one_loop_after_another() -> None:
    embedder, provider = make(concurrency=2, max_batch_size=1)
    for _ in range(3):
        result = asyncio.run(embedder.embed([f"text {n}" for n in range(20)]))
        assert result.failures == ()
    assert len(provider.requests) == 60


def test_closed_event_loops_are_forgotten() -> None:
    embedder, _ = make(concurrency=1, max_batch_size=1)
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    async def use() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        async with (
            asyncio.TaskGroup() as group
        ):  # concurrently, so that its locks have waiters and are bound to their loop
            for number in range(5):
                group.create_task(embedder.embed([f"text {number}", "x" * 3_000]))
                group.create_task(embedder.embed_one(f"text {number}"))

    for _ in range(4):
        asyncio.run(use())
    gc.collect()
    assert [loop() is None for loop in loops] == [True, True, True, False]


def test_one_embedder_serves_an_event_loop_in_each_of_several_threads() -> None:
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
