"""`Embedder.plan`: it predicts requests, tokens, price and failures, and sends nothing."""

from __future__ import annotations

from functools import partial

import pytest

from asyncembed import Embedder
from tests.fakes import make_embedder

make = partial(make_embedder, latency_s=0)


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
async def test_a_plan_predicts_the_requests_that_embed_sends(count: int, options: dict[str, int]) -> None:
    embedder, provider = make(**options)
    texts = [f"text {number}" for number in range(count)]

    plan = await embedder.plan(texts)
    assert provider.requests == []
    result = await embedder.embed(texts)

    assert plan.requests == result.requests
    assert (plan.texts, plan.failures) == (count, ())


async def test_a_plan_counts_tokens_price_time_and_failures() -> None:
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


async def test_a_plan_of_no_texts_is_empty() -> None:
    embedder, _ = make()
    plan = await embedder.plan([])
    assert (plan.texts, plan.requests, plan.tokens) == (0, 0, 0)
