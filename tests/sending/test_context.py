"""`context` through `Embedder`: the deadline of a call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

from asyncembed import Embedder
from asyncembed.batching.tokens import ByteBound
from asyncembed.errors import ConfigError, DeadlineError, RateLimitedError
from asyncembed.types import Reply
from tests.fakes import FakeProvider, make_embedder, now, texts

pytestmark = pytest.mark.virtual_time


async def test_a_call_ends_at_its_deadline_and_keeps_finished_texts() -> None:
    embedder, _ = make_embedder(max_batch_size=1, concurrency=1)
    started = now()

    with pytest.raises(DeadlineError) as caught:
        await embedder.embed(texts(10), deadline=3.5)

    assert now() - started == pytest.approx(3.5, abs=1e-3)
    assert [caught.value.result[index] is not None for index in range(10)] == [True] * 3 + [False] * 7


async def test_the_deadline_includes_the_loading_of_a_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: str | None) -> ByteBound:
        await asyncio.sleep(100)
        return ByteBound()

    monkeypatch.setattr("asyncembed.embedder.embedder.load_counter", hang)
    embedder, _ = make_embedder()
    started = now()
    with pytest.raises(DeadlineError):
        await embedder.embed(["long " * 100_000], deadline=5)
    assert now() - started == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize("deadline", [0, -1.0])
async def test_with_a_deadline_that_has_passed_nothing_is_sent(deadline: float) -> None:
    embedder, provider = make_embedder()
    with pytest.raises(DeadlineError):
        await embedder.embed(["a"], deadline=deadline)
    assert provider.requests == []


async def test_a_deadline_that_is_not_a_number_is_refused() -> None:
    embedder, _ = make_embedder()
    with pytest.raises(ConfigError, match="deadline=nan"):
        await embedder.embed(["a"], deadline=math.nan)


async def test_a_pause_beyond_the_deadline_ends_the_call_at_once() -> None:
    embedder, _ = make_embedder(lambda *_: RateLimitedError("HTTP 429", status=429, retry_after_s=60.0))
    started = now()

    with pytest.raises(DeadlineError):
        await embedder.embed(["a"], deadline=10.0)

    assert now() - started == pytest.approx(1.0, abs=1e-3)


async def test_a_pause_beyond_the_deadline_of_one_call_holds_for_later_calls() -> None:
    embedder, provider = make_embedder(
        lambda number, _: RateLimitedError("HTTP 429", status=429, retry_after_s=60.0) if number == 0 else None
    )
    with pytest.raises(DeadlineError):
        await embedder.embed(["a"], deadline=10.0)

    refused_at = now()
    with pytest.raises(DeadlineError):
        await embedder.embed(["a"], deadline=10.0)  # fails at once: the pause ends after this deadline, too
    assert now() - refused_at < 0.1

    await embedder.embed(["a"])
    assert provider.sent_at[1] - refused_at >= 60.0


async def test_a_timeout_error_of_the_provider_is_raised_unchanged() -> None:
    class Foreign(FakeProvider):
        async def embed(self, texts: Sequence[str]) -> Reply:
            raise TimeoutError("the provider's own")

    embedder = Embedder("fake", provider=Foreign())
    for deadline in (None, 10.0):
        with pytest.raises(TimeoutError, match="the provider's own"):
            await embedder.embed(["a"], deadline=deadline)
