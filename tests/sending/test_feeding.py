"""`feeding` through `Embedder`: texts become inputs and batches while the source is still being read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np
import pytest

from asyncembed.batching.texts import Text
from asyncembed.batching.tokens import ByteBound
from asyncembed.errors import AsyncEmbedError, BadRequestError, QuotaError
from asyncembed.sending.context import CallContext
from asyncembed.sending.feeding import Slices, until_stopped
from tests.fakes import assert_vectors, make_embedder, now, texts, vector_of

pytestmark = pytest.mark.virtual_time


# ---- packing


@pytest.mark.parametrize(
    ("count", "options", "requests"),
    [
        pytest.param(1, {}, 1, id="one text"),
        pytest.param(2_048, {}, 1, id="2,048 texts fill one request"),
        pytest.param(2_049, {}, 2, id="one more needs a second"),
        pytest.param(5_000, {}, 3, id="5,000 = 2,048 + 2,048 + 904"),
        pytest.param(300, {"max_batch_size": 100}, 3, id="300 in hundreds"),
        pytest.param(19_207, {}, 10, id="19,207 / 2,048 = 9.4"),
    ],
)
async def test_texts_are_packed_into_as_few_requests_as_the_limits_allow(
    count: int, options: dict[str, int], requests: int
) -> None:
    embedder, provider = make_embedder(**options)
    expected = texts(count)

    result = await embedder.embed(expected)

    assert len(provider.requests) == result.requests == requests
    assert_vectors(result.embeddings, expected)


# ---- long texts


async def test_a_text_that_is_too_long_fails_alone() -> None:
    embedder, provider = make_embedder(max_tokens_per_text=10)

    result = await embedder.embed(["short", "x" * 10_000, "also"])

    assert result.failed_indices == [1]
    assert provider.requests == [["short", "also"]]


async def test_the_mean_of_pieces_is_weighted_and_has_unit_length() -> None:
    embedder, provider = make_embedder(max_tokens_per_text=10, too_long="mean")
    long = "abcdefghij" * 2 + "klmno"

    result = await embedder.embed(["short", long])

    pieces = [text for sent in provider.requests for text in sent if text != "short"]
    assert "".join(pieces) == long
    total = sum(np.float32(len(piece)) * vector_of(piece) for piece in pieces)
    np.testing.assert_allclose(result.embeddings[1], total / np.linalg.norm(total), rtol=1e-5)


async def test_a_long_text_fails_once_if_one_of_its_pieces_fails() -> None:
    embedder, _ = make_embedder(
        lambda _, sent: BadRequestError("HTTP 400", status=400) if "klmno" in sent else None,
        max_tokens_per_text=10,
        too_long="mean",
        max_batch_size=1,
    )

    result = await embedder.embed(["short", "abcdefghij" * 2 + "klmno"])

    assert result.failed_indices == [1]


# ---- stopping


async def test_a_fatal_error_ends_the_counting_of_tokens() -> None:
    embedder, _ = make_embedder(lambda *_: QuotaError("no money", status=429), latency_s=0)
    expected = [f"{number} " + "long " * 200_000 for number in range(50)]
    counted: list[str] = []

    class Counting(ByteBound):
        def count(self, texts: Sequence[str]) -> list[int]:
            counted.extend(texts)
            return [1] * len(texts)

    async def load(_: str | None) -> ByteBound:
        return Counting()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asyncembed.embedder.embedder.load_counter", load)
        with pytest.raises(QuotaError) as caught:
            await embedder.embed(expected)

    assert len(caught.value.result.failures) == 50
    assert len(counted) < 30


async def hang_after(closed: list[bool], *slices: list[Text]) -> Slices:
    """Yield the slices, then nothing more; note when this source is closed."""
    try:
        for each in slices:
            yield each
        await asyncio.Event().wait()
    finally:
        closed.append(True)


async def test_an_idle_source_is_closed_as_soon_as_the_call_is_stopped() -> None:
    call, closed, began = CallContext(), list[bool](), now()
    asyncio.get_running_loop().call_later(5, call.stop, AsyncEmbedError("stopped"))
    taken = [texts async for texts in until_stopped(hang_after(closed, [Text("a", (0,))], []), call)]
    assert [[text.content for text in texts] for texts in taken] == [["a"], []]
    assert now() - began == pytest.approx(5, abs=1e-3)
    assert closed == [True]


async def test_nothing_is_taken_from_a_source_after_the_call_was_stopped() -> None:
    call = CallContext()
    call.stop(AsyncEmbedError("stopped"))
    assert [texts async for texts in until_stopped(hang_after([], [Text("a", (0,))]), call)] == []


@pytest.mark.parametrize("error", [KeyError("broken"), TimeoutError("too slow")], ids=repr)
async def test_an_error_of_the_source_is_not_hidden_by_the_check_for_a_stop(error: Exception) -> None:
    async def slices() -> Slices:
        yield [Text("a", (0,))]
        raise error

    with pytest.raises(type(error)) as caught:
        async for _ in until_stopped(slices(), CallContext()):
            pass
    assert caught.value is error


async def test_a_source_is_closed_with_the_generator_that_reads_it() -> None:
    closed: list[bool] = []
    async with aclosing(until_stopped(hang_after(closed, [], []), CallContext())) as taken:
        assert await anext(taken) == []
    assert closed == [True]
