"""`pacing`: shared pauses, limits per minute, and the order in which requests are sent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import numpy as np
import pytest

from asyncembed import Embedder
from asyncembed.errors import RateLimitedError, ServerError
from asyncembed.sending.pacing import ConcurrencyLimiter, RateLimiter, shared_rate_limiter
from asyncembed.sending.rate_limits import Bucket
from asyncembed.types import ProviderInfo, Rates, Reply
from tests.fakes import now, vector_of

pytestmark = pytest.mark.virtual_time


class LimitedProvider:
    """Keeps token and request buckets as OpenAI does, and sends their state as headers unless `sends_headers=False`."""

    def __init__(
        self,
        *,
        tokens_per_minute: float = math.inf,
        requests_per_minute: float = math.inf,
        capacity_s: float = 60.0,
        stated_capacity_s: float | None = None,
        latency_s: float = 0.2,
        sends_headers: bool = True,
        retry_after: bool = True,
    ) -> None:
        self.info = ProviderInfo(identity=object())
        self._rates = {"tokens": tokens_per_minute / 60, "requests": requests_per_minute / 60}
        self._capacity = {name: rate * capacity_s for name, rate in self._rates.items()}
        self._limit = {name: rate * (stated_capacity_s or capacity_s) for name, rate in self._rates.items()}
        self._levels = dict(self._capacity)
        self._at = 0.0
        self._latency_s = latency_s
        self._sends_headers = sends_headers
        self._retry_after = retry_after
        self.accepted = self.refused = 0

    async def embed(self, texts: Sequence[str]) -> Reply:
        tokens = sum(map(len, texts))
        needed = {"tokens": tokens, "requests": 1}
        self._refill()
        missing = {name: needed[name] - self._levels[name] for name in needed}
        waits = [missing[name] / self._rates[name] for name in needed if missing[name] > 0]
        if not waits:
            for name in needed:
                self._levels[name] -= needed[name]
        rates = self._headers() if self._sends_headers else None
        await asyncio.sleep(self._latency_s)
        if waits:
            self.refused += 1
            error = RateLimitedError("HTTP 429", status=429, retry_after_s=max(waits) if self._retry_after else None)
            error.rates = rates
            raise error
        self.accepted += 1
        return Reply(np.stack([vector_of(text) for text in texts]), tokens, rates)

    def _refill(self) -> None:
        seconds, self._at = now() - self._at, now()
        for name, rate in self._rates.items():
            if rate < math.inf:
                self._levels[name] = min(self._capacity[name], self._levels[name] + rate * seconds)

    def _headers(self) -> Rates:
        headers: dict[str, float | int] = {}
        for name, rate in self._rates.items():
            if rate < math.inf:
                headers[f"limit_{name}"] = int(self._limit[name])
                headers[f"remaining_{name}"] = int(self._levels[name])
                headers[f"reset_{name}_s"] = round((self._capacity[name] - self._levels[name]) / rate, 3)
        return Rates(**headers)  # type: ignore[arg-type]

    async def aclose(self) -> None: ...


TEXTS = [f"{number:05}" + "x" * 95 for number in range(20_000)]  # 100 tokens each, as the fakes count


@pytest.mark.parametrize(
    ("limits", "options"),
    [
        pytest.param({"sends_headers": True}, {}, id="learned from headers"),
        pytest.param({"sends_headers": True}, {"tokens_per_minute": 600_000}, id="given and in headers"),
        pytest.param({"sends_headers": False}, {"tokens_per_minute": 600_000}, id="given, no headers"),
        pytest.param({"sends_headers": True, "capacity_s": 1.0}, {}, id="a small bucket, learned"),
        pytest.param(
            {"sends_headers": True, "capacity_s": 1.0}, {"tokens_per_minute": 600_000}, id="a small bucket, given"
        ),
        pytest.param({"sends_headers": True, "retry_after": False}, {}, id="no retry-after"),
        pytest.param(
            {"sends_headers": True, "capacity_s": 1.2, "stated_capacity_s": 60.0},
            {},
            id="a small bucket, its limit stated per minute",
        ),
    ],
)
async def test_a_job_under_a_token_limit_takes_hardly_more_than_the_ideal_time(
    limits: dict[str, bool | float], options: dict[str, float]
) -> None:
    provider = LimitedProvider(tokens_per_minute=600_000, **limits)  # type: ignore[arg-type]
    embedder = Embedder("fake", provider=provider, max_batch_size=50, **options)  # type: ignore[arg-type]
    began = now()

    await embedder.embed(TEXTS)  # 2,000,000 tokens in 400 requests

    capacity_s = float(limits.get("capacity_s", 60.0))
    ideal_s = 2_000_000 / 10_000 - capacity_s
    assert now() - began <= 1.10 * ideal_s
    assert provider.refused <= 0.02 * provider.accepted


@pytest.mark.parametrize("sends_headers", [True, False], ids=["headers", "no headers"])
async def test_a_job_under_a_request_limit_takes_hardly_more_than_the_ideal_time(sends_headers: bool) -> None:
    provider = LimitedProvider(requests_per_minute=120, sends_headers=sends_headers)
    embedder = Embedder(
        "fake", provider=provider, max_batch_size=50, requests_per_minute=None if sends_headers else 120
    )
    began = now()

    await embedder.embed(TEXTS)  # 400 requests; 120 may go at once, then 2 a second

    assert now() - began <= 1.10 * (400 - 120) / 2
    assert provider.refused <= 0.02 * provider.accepted


@pytest.mark.parametrize("sends_headers", [True, False], ids=["headers", "no headers"])
@pytest.mark.parametrize(
    ("limit", "wait_s"),
    [
        pytest.param({"requests_per_minute": 1.0}, 60, id="one request a minute"),
        pytest.param({"tokens_per_minute": 1_000.0}, 300, id="a batch of five times the bucket"),
    ],
)
async def test_a_very_low_limit_of_the_user_is_kept(
    limit: dict[str, float], wait_s: float, sends_headers: bool
) -> None:
    provider = LimitedProvider(requests_per_minute=60, sends_headers=sends_headers)
    embedder = Embedder("fake", provider=provider, max_batch_size=50, **limit)  # type: ignore[arg-type]
    began = now()

    await embedder.embed(TEXTS[:150])  # three requests of 5,000 tokens

    assert now() - began == pytest.approx(2 * wait_s, rel=0.02)
    assert provider.refused == 0


async def test_a_limit_that_several_embedders_set_is_one_limit() -> None:
    provider = LimitedProvider()
    embedders = [Embedder("fake", provider=provider, requests_per_minute=60) for _ in range(10)]
    for embedder in embedders:
        await embedder.embed(["a"])
        await embedder.aclose()
        await embedder.embed(["a"])
    rate = shared_rate_limiter((provider.info.identity, "fake"))
    assert list(rate.own) == [(60, False)]


async def test_a_request_limit_per_hour_is_waited_for_as_long_as_retry_after_says() -> None:
    provider = LimitedProvider(requests_per_minute=10 / 60, capacity_s=3_600)  # ten an hour
    embedder = Embedder("fake", provider=provider, max_batch_size=1)
    began = now()

    result = await embedder.embed(TEXTS[:14])

    assert result.failures == ()
    assert provider.refused <= 8  # requests in flight when the first one was refused
    assert now() - began <= 1.1 * 4 * 360


async def test_two_embedders_with_one_key_share_the_limit() -> None:
    provider = LimitedProvider(tokens_per_minute=600_000)
    embedders = [Embedder("fake", provider=provider, max_batch_size=50) for _ in range(2)]
    began = now()

    async with asyncio.TaskGroup() as group:
        group.create_task(embedders[0].embed(TEXTS[:10_000]))
        group.create_task(embedders[1].embed(TEXTS[10_000:]))

    assert now() - began <= 1.10 * (200 - 60)
    assert provider.refused <= 0.02 * provider.accepted


async def test_requests_larger_than_the_bucket_are_sent_one_by_one_when_it_is_full() -> None:
    rate = RateLimiter(tokens=Bucket(per_s=10, capacity=100, level=100, at=now()))
    began = now()

    for _ in range(2):
        rate.leave(await rate.enter(500))

    # the first one at once, since the bucket is full; it then refills from -400 to 100, by 10 a second
    assert now() - began == pytest.approx(50, rel=0.01)


async def test_a_large_request_is_not_starved_by_small_ones() -> None:
    rate = RateLimiter(answered=True, tokens=Bucket(per_s=10, capacity=100, level=0, at=now()))
    order: list[str] = []

    async def send(name: str, tokens: int) -> None:
        rate.leave(await rate.enter(tokens))
        order.append(name)

    async with asyncio.TaskGroup() as group:
        for name, tokens in (("small 1", 10), ("large", 90), *((f"small {n}", 10) for n in range(2, 12))):
            group.create_task(send(name, tokens))

    assert order == ["small 1", "large", *(f"small {n}" for n in range(2, 12))]


@pytest.mark.parametrize("per_minute", [None, 120])
async def test_a_large_request_is_not_starved_by_urgent_ones_where_tokens_are_not_scarce(
    per_minute: float | None,
) -> None:
    rate = RateLimiter(answered=True)
    rate.limit(per_minute, None)
    slots = ConcurrencyLimiter(rate, 1 if per_minute is None else 8)
    served: list[str] = []

    async def use(name: str, tokens: int, *, urgent: bool) -> None:
        async with slots.slot(tokens, urgent=urgent):
            served.append(name)
            await asyncio.sleep(0.1)

    async def urgent_for_ever() -> None:
        while True:
            await use("urgent", 5, urgent=True)

    async with asyncio.TaskGroup() as group:
        loops = [group.create_task(urgent_for_ever()) for _ in range(4)]
        await asyncio.sleep(120)  # uses up what the bucket held at first
        before = len(served)
        await use("bulk", 25_000, urgent=False)
        for loop in loops:
            loop.cancel()
    assert served[before:].index("bulk") <= 8


async def test_a_pause_holds_all_requests_for_its_time() -> None:
    rate = RateLimiter(answered=True)
    began = now()
    rate.pause(10)

    async def send() -> float:
        rate.leave(await rate.enter(1))
        return now() - began

    tasks = [asyncio.create_task(send()) for _ in range(5)]
    await asyncio.wait(tasks)

    assert all(10 <= task.result() <= 10.6 for task in tasks)


async def test_a_pause_that_is_extended_is_waited_for_in_full() -> None:
    rate = RateLimiter(answered=True)
    began = now()
    rate.pause(10)
    waiting = asyncio.create_task(rate.enter(1))
    await asyncio.sleep(5)

    rate.pause(20)
    await waiting

    assert 25 <= now() - began <= 26.1


async def test_fewer_requests_are_in_flight_after_an_overload_and_more_again_after_successes() -> None:
    overloaded_until = now() + 20

    class Overloaded(LimitedProvider):
        most = 0
        in_flight = 0

        async def embed(self, texts: Sequence[str]) -> Reply:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            try:
                if self.in_flight > 2 and now() < overloaded_until:
                    await asyncio.sleep(0.1)
                    raise ServerError("HTTP 503", status=503)
                return await super().embed(texts)
            finally:
                self.in_flight -= 1

    provider = Overloaded(sends_headers=False)
    embedder = Embedder("fake", provider=provider, max_batch_size=1)

    result = await embedder.embed(TEXTS[:60])
    assert result.failures == ()
    assert result.retries <= 50  # it would be 108 with the same concurrency all the time
    provider.most = 0
    await embedder.embed(TEXTS[:200])
    assert provider.most == 8


async def test_before_the_first_reply_only_one_large_request_is_sent() -> None:
    slots = ConcurrencyLimiter(RateLimiter(), 8)
    sent: list[float] = []

    async def send() -> None:
        async with slots.slot(100_000):
            sent.append(now())
            await asyncio.sleep(1)
            slots.rate.succeeded()

    began = now()
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(send())

    assert [round(at - began) for at in sent] == [0, 1, 1, 1]


@pytest.mark.parametrize("steps", range(8))
async def test_a_cancelled_waiter_leaves_its_place_to_the_next(steps: int) -> None:
    slots = ConcurrencyLimiter(RateLimiter(answered=True, tokens=Bucket(per_s=1, capacity=10, level=0, at=now())), 2)

    async def send() -> None:
        async with slots.slot(3):
            await asyncio.sleep(1)

    first, second, third = (asyncio.create_task(send()) for _ in range(3))
    for _ in range(steps):
        await asyncio.sleep(1)
    first.cancel()
    await asyncio.wait([first, second, third])

    assert second.exception() is third.exception() is None
    assert slots.rate.in_flight == {}


async def test_a_rate_limiter_is_shared_by_key_and_forgotten_with_its_last_user() -> None:
    first = shared_rate_limiter("place")
    assert shared_rate_limiter("place") is first
    assert shared_rate_limiter("elsewhere") is not first
    first.pause(60)
    del first
    assert shared_rate_limiter("place").paused_until == 0
