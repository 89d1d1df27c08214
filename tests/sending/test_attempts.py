"""`attempts` through `Embedder`: concurrency, retries, learned limits and fatal errors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from asyncembed import AuthenticationError, Embedder
from asyncembed.errors import (
    AsyncEmbedError,
    BadRequestError,
    ProtocolError,
    ProviderDownError,
    QuotaError,
    RateLimitedError,
    ServerError,
    TooLargeError,
    TransportError,
)
from asyncembed.sending.attempts import REMEMBERED_S
from asyncembed.types import Reply
from tests.fakes import FakeProvider, assert_vectors, make_embedder, now, texts

pytestmark = pytest.mark.virtual_time


# ---- concurrency


@pytest.mark.parametrize("concurrency", [1, 3, 1_000])
async def test_no_more_requests_are_in_flight_than_the_concurrency_allows(concurrency: int) -> None:
    embedder, provider = make_embedder(concurrency=concurrency, max_batch_size=1)
    started = now()

    await embedder.embed(texts(30))

    assert provider.most_in_flight == min(concurrency, 30)
    assert now() - started == pytest.approx(math.ceil(30 / concurrency), abs=1e-3)


# ---- retries


async def test_a_server_error_is_retried_after_a_backoff() -> None:
    embedder, provider = make_embedder(lambda number, _: ServerError("HTTP 500") if number < 2 else None)

    result = await embedder.embed(["a"])

    assert (result.requests, result.retries, result.failures) == (3, 2, ())
    first, second, third = provider.sent_at
    # 1 s of latency, then backoffs of 0.5 s and 1 s, each times 0.5 to 1
    assert 1.25 <= second - first <= 1.51
    assert 1.5 <= third - second <= 2.01


async def test_a_lost_connection_is_retried_at_once_and_then_after_a_backoff() -> None:
    embedder, provider = make_embedder(lambda number, _: TransportError("lost") if number < 2 else None)

    await embedder.embed(["a"])

    first, second, third = provider.sent_at
    assert second - first == pytest.approx(1.0, abs=1e-3)  # the latency alone
    assert 1.5 <= third - second <= 2.01


async def test_after_a_429_no_request_is_sent_before_its_retry_after() -> None:
    # the second of four concurrent requests is refused for 30 seconds
    embedder, provider = make_embedder(
        lambda number, _: RateLimitedError("HTTP 429", status=429, retry_after_s=30.0) if number == 1 else None,
        concurrency=4,
        max_batch_size=1,
    )

    result = await embedder.embed(texts(20))

    refused_at = provider.sent_at[1] + provider.latency_s
    later = [sent for sent in provider.sent_at if sent > refused_at + 1e-6]
    assert later
    assert min(later) >= refused_at + 30.0
    assert result.failures == ()


async def test_429s_without_retry_after_cost_less_than_one_request_a_second() -> None:
    start = now()
    embedder, provider = make_embedder(
        lambda number, _: RateLimitedError("HTTP 429", status=429) if now() - start < 30 else None,
        latency_s=0.01,
        max_batch_size=1,
    )

    result = await embedder.embed(texts(40))

    assert result.failures == ()
    assert sum(sent - start < 30 for sent in provider.sent_at) < 30


async def test_a_batch_that_backs_off_does_not_delay_other_batches() -> None:
    embedder, provider = make_embedder(
        lambda _, sent: TransportError("lost") if "text 0" in sent else None,
        concurrency=1,
        max_batch_size=1,
    )

    result = await embedder.embed(texts(5))

    assert result.failed_indices == [0]
    assert provider.requests[:2] == [["text 0"], ["text 1"]]  # not "text 0" again after its backoff
    assert_vectors(result.embeddings, texts(5), failed=[0])


async def test_an_outage_stops_the_call_within_its_retries() -> None:
    embedder, provider = make_embedder(lambda *_: ServerError("HTTP 500", status=500), max_retries=4)

    with pytest.raises(ProviderDownError) as caught:
        await embedder.embed(texts(2_048))

    # 5 attempts, and two single texts as probes, to see whether one text is to blame
    assert len(provider.requests) == 5 + 2
    assert len(caught.value.result.failures) == 2_048


async def test_the_request_rate_falls_during_an_outage() -> None:
    embedder, provider = make_embedder(lambda *_: TransportError("refused"), latency_s=0.001, max_batch_size=1)

    with pytest.raises(ProviderDownError):
        await embedder.embed(texts(100))

    start = provider.sent_at[0]
    by_time = [sum(a <= sent - start < b for sent in provider.sent_at) for a, b in ((0, 4), (4, 20), (20, 100))]
    rates = [count / seconds for count, seconds in zip(by_time, (4, 16, 80), strict=True)]
    assert rates == sorted(rates, reverse=True)
    assert len(provider.sent_at) <= 16 * 9


@pytest.mark.parametrize("error", [ServerError("HTTP 500", status=500), TransportError("lost"), ProtocolError("?")])
@pytest.mark.parametrize(
    ("count", "max_retries", "requests"),
    [
        pytest.param(1, 0, 1, id="one text, no retry"),
        pytest.param(100, 0, 1, id="many texts, no retry"),
        pytest.param(1, 1, 2, id="one text, one retry"),
        pytest.param(100, 1, 2 + 2, id="many texts, one retry, and two alone"),
        pytest.param(1, 2, 3, id="one text, two retries"),
        pytest.param(100, 2, 3 + 2, id="many texts, two retries, and two alone"),
    ],
)
async def test_retries_are_counted(error: AsyncEmbedError, count: int, max_retries: int, requests: int) -> None:
    embedder, provider = make_embedder(lambda *_: error, max_retries=max_retries)

    with pytest.raises(ProviderDownError) as caught:
        await embedder.embed(texts(count))

    assert len(provider.requests) == caught.value.result.requests == requests


async def test_a_pause_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    embedder, _ = make_embedder(
        lambda number, _: RateLimitedError("HTTP 429", status=429, retry_after_s=3_600.0) if number < 8 else None,
        max_batch_size=1,
    )

    await embedder.embed(texts(20))

    assert [record.getMessage() for record in caplog.records] == ["pausing for 3600.0 s: too fast for the provider"]


# ---- limits that the provider names


async def test_a_limit_on_inputs_is_learned_and_remembered() -> None:
    def script(_: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        return None if len(sent) <= 32 else TooLargeError("HTTP 413", status=413, max_inputs=32)

    embedder, provider = make_embedder(script, concurrency=1)

    result = await embedder.embed(texts(1_000))
    first = len(provider.requests)
    await embedder.embed(texts(320))

    assert result.failures == ()
    assert first <= 1 + math.ceil(1_000 / 32) + 1  # one refusal, then parts of 32
    assert len(provider.requests) - first <= 10


async def test_a_learned_limit_is_forgotten_after_a_while() -> None:
    def script(number: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        return TooLargeError("HTTP 413", status=413, max_inputs=2) if number == 0 else None

    embedder, _ = make_embedder(script)

    assert (await embedder.embed(texts(100))).requests == 51
    await asyncio.sleep(REMEMBERED_S)
    assert (await embedder.embed(texts(100))).requests == 1


async def test_a_learned_limit_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    embedder, _ = make_embedder(
        lambda _, sent: None if len(sent) <= 32 else TooLargeError("HTTP 413", status=413, max_inputs=32)
    )
    await embedder.embed(texts(20_000))
    assert [record.getMessage() for record in caplog.records] == [
        "the provider takes 32 inputs and 300000 tokens a request; remembered"
    ]


async def test_a_limit_that_the_provider_does_not_name_is_found_by_splitting() -> None:
    embedder, provider = make_embedder(
        lambda _, sent: None if len(sent) <= 32 else BadRequestError("HTTP 422", status=422)
    )

    result = await embedder.embed(texts(256))

    assert result.failures == ()
    assert max(len(sent) for sent in provider.requests[-8:]) == 32


# ---- fatal errors


@pytest.mark.parametrize("error", [QuotaError("no money", status=429), AuthenticationError("no", status=401)])
async def test_a_fatal_error_costs_at_most_one_request_per_slot(error: AsyncEmbedError) -> None:
    embedder, provider = make_embedder(lambda *_: error, concurrency=4, max_batch_size=1)

    with pytest.raises(type(error)) as caught:
        await embedder.embed(texts(100))

    assert caught.value is error
    assert len(provider.requests) <= 4
    assert len(caught.value.result.failures) == 100


async def test_a_fatal_error_keeps_texts_that_are_finished_or_in_flight() -> None:
    embedder, _ = make_embedder(
        lambda number, _: QuotaError("no money", status=429) if number == 5 else None, concurrency=2, max_batch_size=1
    )

    with pytest.raises(QuotaError) as caught:
        await embedder.embed(texts(100))

    result = caught.value.result
    done = [index for index in range(100) if result[index] is not None]
    assert 5 <= len(done) <= 7
    assert_vectors(result.embeddings, texts(100), failed=result.failed_indices)


async def test_a_hanging_request_delays_a_fatal_error_only_briefly() -> None:
    provider = FakeProvider(lambda number, _: QuotaError("no money", status=429) if number == 1 else None)

    async def embed(sent: Sequence[str]) -> object:
        if sent == ["text 0"]:
            await asyncio.sleep(3_600)
        return await FakeProvider.embed(provider, sent)

    provider.embed = embed  # type: ignore[method-assign, assignment]
    embedder = Embedder("fake", provider=provider, max_batch_size=1, concurrency=4)
    started = now()

    with pytest.raises(QuotaError):
        await embedder.embed(texts(10))

    assert now() - started < 15


# ---- providers that do not check their replies


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
async def test_replies_of_a_custom_provider_are_validated(vectors: Any, why: str) -> None:
    class Careless:
        async def embed(self, texts: Sequence[str]) -> Reply:
            return Reply(vectors, 1)

    with pytest.raises(ProviderDownError, match=why) as caught:
        await Embedder("fake", provider=Careless(), max_retries=1).embed([f"text {n}" for n in range(3)])
    assert len(caught.value.result.failures) == 3
