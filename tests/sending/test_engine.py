"""`engine` through `Embedder`, on the virtual clock and a scripted provider: what is sent, and what comes of it."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from asyncembed import Embedder
from asyncembed.batching.tokens import ByteBound
from asyncembed.errors import (
    AllFailedError,
    AsyncEmbedError,
    AuthenticationError,
    BadRequestError,
    ConfigError,
    DeadlineError,
    ProtocolError,
    ProviderDownError,
    QuotaError,
    RateLimitedError,
    RejectedTextError,
    RequestError,
    ServerError,
    TooLargeError,
    TransportError,
)
from asyncembed.sending.attempts import REMEMBERED_S
from asyncembed.types import Reply
from tests.fakes import FakeProvider, Script, vector_of

pytestmark = pytest.mark.virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


def make(script: Script | None = None, *, latency_s: float = 1.0, **options: object) -> tuple[Embedder, FakeProvider]:
    provider = FakeProvider(script, latency_s)
    return Embedder("fake", provider=provider, **options), provider  # type: ignore[arg-type]


def texts(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


def assert_right(embeddings: np.ndarray, expected: Sequence[str], failed: Sequence[int] = ()) -> None:
    for index, text in enumerate(expected):
        if index in failed:
            assert np.isnan(embeddings[index]).all()
        else:
            np.testing.assert_array_equal(embeddings[index], vector_of(text))


# ---- packing and concurrency


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
async def test_so_many_texts_take_so_many_requests(count: int, options: dict[str, int], requests: int) -> None:
    embedder, provider = make(**options)
    expected = texts(count)

    result = await embedder.embed(expected)

    assert len(provider.requests) == result.requests == requests
    assert_right(result.embeddings, expected)


async def test_equal_texts_are_sent_once_and_answered_everywhere() -> None:
    embedder, provider = make()

    result = await embedder.embed(["a", "b", "a", "a", "b"])

    assert provider.requests == [["a", "b"]]
    assert_right(result.embeddings, ["a", "b", "a", "a", "b"])


@pytest.mark.parametrize("concurrency", [1, 3, 1_000])
async def test_never_more_requests_are_under_way_than_allowed(concurrency: int) -> None:
    embedder, provider = make(concurrency=concurrency, max_batch_size=1)
    started = now()

    await embedder.embed(texts(30))

    assert provider.most_in_flight == min(concurrency, 30)
    assert now() - started == pytest.approx(math.ceil(30 / concurrency), abs=1e-3)


async def test_a_small_call_does_not_wait_for_the_end_of_a_large_one() -> None:
    embedder, _ = make(concurrency=4, max_batch_size=1)
    async with asyncio.TaskGroup() as group:
        large = group.create_task(embedder.embed(texts(400)))
        await asyncio.sleep(10.5)
        began = now()
        await embedder.embed(["small"])
        # behind what had its turn before: four under way, and as many as wait for a slot
        assert now() - began <= 3.5
        assert not large.done()


async def test_two_calls_share_the_slots_of_their_embedder() -> None:
    embedder, provider = make(concurrency=4, max_batch_size=1)

    async with asyncio.TaskGroup() as group:
        group.create_task(embedder.embed(texts(10)))
        group.create_task(embedder.embed(texts(10)))

    assert provider.most_in_flight == 4


# ---- retrying


async def test_a_server_error_is_retried_after_a_backoff() -> None:
    embedder, provider = make(lambda number, _: ServerError("HTTP 500") if number < 2 else None)

    result = await embedder.embed(["a"])

    assert (result.requests, result.retries, result.failures) == (3, 2, ())
    first, second, third = provider.sent_at
    # 1 s of latency, then 0.5 s and 1 s, each times 0.5 to 1
    assert 1.25 <= second - first <= 1.51
    assert 1.5 <= third - second <= 2.01


async def test_a_lost_connection_is_replaced_at_once_and_only_then_waited_for() -> None:
    embedder, provider = make(lambda number, _: TransportError("lost") if number < 2 else None)

    await embedder.embed(["a"])

    first, second, third = provider.sent_at
    assert second - first == pytest.approx(1.0, abs=1e-3)  # the latency alone
    assert 1.5 <= third - second <= 2.01


async def test_after_a_refusal_nobody_sends_before_its_time() -> None:
    # the second of four concurrent requests is refused for 30 seconds
    embedder, provider = make(
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


async def test_refusals_without_a_hint_end_and_cost_less_than_one_request_a_second() -> None:
    start = now()
    embedder, provider = make(
        lambda number, _: RateLimitedError("HTTP 429", status=429) if now() - start < 30 else None,
        latency_s=0.01,
        max_batch_size=1,
    )

    result = await embedder.embed(texts(40))

    assert result.failures == ()
    assert sum(sent - start < 30 for sent in provider.sent_at) < 30


async def test_a_batch_that_waits_does_not_keep_others_from_being_sent() -> None:
    embedder, provider = make(
        lambda _, sent: TransportError("lost") if "text 0" in sent else None,
        concurrency=1,
        max_batch_size=1,
    )

    result = await embedder.embed(texts(5))

    assert result.failed_indices == [0]
    assert provider.requests[:2] == [["text 0"], ["text 1"]]  # not the same again, after a pause
    assert_right(result.embeddings, texts(5), failed=[0])


async def test_an_outage_stops_the_run_within_the_retry_budget() -> None:
    embedder, provider = make(lambda *_: ServerError("HTTP 500", status=500), max_retries=4)

    with pytest.raises(ProviderDownError) as caught:
        await embedder.embed(texts(2_048))

    # 5 attempts, and two single texts to see that it is not one of them
    assert len(provider.requests) == 5 + 2
    assert len(caught.value.result.failures) == 2_048


async def test_in_an_outage_the_load_decays() -> None:
    embedder, provider = make(lambda *_: TransportError("refused"), latency_s=0.001, max_batch_size=1)

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
    embedder, provider = make(lambda *_: error, max_retries=max_retries)

    with pytest.raises(ProviderDownError) as caught:
        await embedder.embed(texts(count))

    assert len(provider.requests) == caught.value.result.requests == requests


async def test_a_pause_is_logged_once_and_not_by_every_task(caplog: pytest.LogCaptureFixture) -> None:
    embedder, _ = make(
        lambda number, _: RateLimitedError("HTTP 429", status=429, retry_after_s=3_600.0) if number < 8 else None,
        max_batch_size=1,
    )

    await embedder.embed(texts(20))

    assert [record.getMessage() for record in caplog.records] == ["pausing for 3600.0 s: too fast for the provider"]


# ---- isolating


@pytest.mark.parametrize("position", [0, 1, 1_023, 1_024, 2_046, 2_047])
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(BadRequestError("HTTP 400", status=400), id="400"),
        pytest.param(ServerError("HTTP 500", status=500), id="500"),
        pytest.param(ProtocolError("expected finite numbers"), id="NaN"),
        pytest.param(TransportError("no whole answer"), id="lost"),
    ],
)
async def test_one_poison_among_2048_costs_one_text_and_few_requests(position: int, error: AsyncEmbedError) -> None:
    expected = texts(2_048)
    poison = expected[position]
    embedder, provider = make(lambda _, sent: error if poison in sent else None)

    result = await embedder.embed(expected)

    assert result.failed_indices == [position]
    assert_right(result.embeddings, expected, failed=[position])
    # a 400 is split at once: 2·log2(2048) = 22. The others: 2 more attempts, 2 probes, 22 parts, 4 for the culprit.
    assert len(provider.requests) - 1 <= (22 if isinstance(error, BadRequestError) else 30)


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("one_in", [100, 20, 4])
@pytest.mark.parametrize(
    "error", [ServerError("HTTP 500", status=500), ProtocolError("expected finite numbers")], ids=["500", "NaN"]
)
async def test_many_texts_that_break_their_requests_fail_alone(
    error: AsyncEmbedError, one_in: int, concurrency: int
) -> None:
    expected = texts(2_048)
    poisons = {text for index, text in enumerate(expected) if index % one_in == one_in // 2}
    embedder, provider = make(
        lambda _, sent: error if poisons & set(sent) else None, latency_s=0.01, concurrency=concurrency
    )

    result = await embedder.embed(expected)

    failed = [index for index, text in enumerate(expected) if text in poisons]
    assert result.failed_indices == failed
    assert_right(result.embeddings, expected, failed=failed)
    # each is searched for by halves (22 requests, shared with its neighbours) and asked five times
    assert len(provider.requests) < 4 * 2_048
    assert len(provider.requests) < len(poisons) * (22 + 5)


async def test_an_outage_while_a_culprit_is_searched_for_loses_no_good_text() -> None:
    start = now()
    expected = texts(256)

    def script(_: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        # the search is down to single texts after some seconds; then nothing passes for most of a minute
        down = 4 < now() - start < 50
        return ServerError("HTTP 500", status=500) if down or "text 77" in sent else None

    embedder, _ = make(script, latency_s=0.1, concurrency=2)

    result = await embedder.embed(expected)

    assert result.failed_indices == [77]


async def test_all_texts_of_a_call_break_the_server_while_another_call_goes_well() -> None:
    embedder, provider = make(
        lambda _, sent: ServerError("HTTP 500", status=500) if "bad" in sent[0] else None, max_batch_size=100
    )
    bad = [f"bad {number}" for number in range(200)]

    async with asyncio.TaskGroup() as group:
        good = group.create_task(embedder.embed(texts(10_000)))
        with pytest.raises(RuntimeError) as caught:
            await embedder.embed(bad)

    assert good.result().failures == ()
    assert len(caught.value.result.failures) == 200  # type: ignore[attr-defined]
    # it is found out after some texts that it is all of them
    assert sum("bad" in sent[0] for sent in provider.requests) < 200


async def test_many_poisons_fail_alone() -> None:
    expected = texts(500)
    poisons = {f"text {number}" for number in (0, 1, 2, 77, 250, 498, 499)}
    embedder, _ = make(lambda _, sent: BadRequestError("HTTP 400", status=400) if poisons & set(sent) else None)

    result = await embedder.embed(expected)

    failed = [index for index, text in enumerate(expected) if text in poisons]
    assert result.failed_indices == failed
    assert all(isinstance(failure.error, RejectedTextError) for failure in result.failures)
    assert_right(result.embeddings, expected, failed=failed)


async def test_an_outage_in_the_middle_of_a_run_is_not_taken_for_poisons() -> None:
    embedder, provider = make(
        lambda number, _: ServerError("HTTP 500", status=500) if number >= 20 else None, max_batch_size=64
    )

    with pytest.raises(ProviderDownError) as caught:
        await embedder.embed(texts(64 * 100))

    result = caught.value.result
    assert all(isinstance(failure.error, ProviderDownError) for failure in result.failures)
    assert len(result.failures) == 64 * 80
    assert len(provider.requests) - 20 <= 16 * (9 + 2)


async def test_random_faults_fail_no_good_text() -> None:
    dice = random.Random(7)
    faults = [
        ServerError("HTTP 500", status=500),
        ServerError("HTTP 503", status=503),
        TransportError("lost"),
        ProtocolError("expected 3 embeddings, got 2"),
        RateLimitedError("HTTP 429", status=429, retry_after_s=0.5),
    ]
    embedder, _ = make(lambda *_: dice.choice(faults) if dice.random() < 0.3 else None, max_batch_size=50)

    result = await embedder.embed(texts(5_000))

    assert result.failures == ()
    assert_right(result.embeddings, texts(5_000))


async def test_two_texts_of_which_one_is_poison() -> None:
    embedder, _ = make(lambda _, sent: ServerError("HTTP 500", status=500) if "bad" in sent else None)

    result = await embedder.embed(["good", "bad"])

    assert result.failed_indices == [1]


async def test_a_provider_that_refuses_everything_is_not_asked_for_every_text() -> None:
    embedder, provider = make(lambda *_: BadRequestError("HTTP 400: no", status=400), concurrency=2)

    with pytest.raises(RequestError) as caught:
        await embedder.embed(texts(5_000))

    assert len(provider.requests) < 100
    assert len(caught.value.result.failures) == 5_000


async def test_a_cap_on_inputs_is_learned_and_remembered() -> None:
    def script(_: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        return None if len(sent) <= 32 else TooLargeError("HTTP 413", status=413, max_inputs=32)

    embedder, provider = make(script, concurrency=1)

    result = await embedder.embed(texts(1_000))
    first = len(provider.requests)
    await embedder.embed(texts(320))

    assert result.failures == ()
    assert first <= 1 + math.ceil(1_000 / 32) + 1  # one refusal, then parts of 32
    assert len(provider.requests) - first <= 10


async def test_a_cap_is_forgotten_after_a_while_so_that_a_mistake_does_no_lasting_harm() -> None:
    def script(number: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        return TooLargeError("HTTP 413", status=413, max_inputs=2) if number == 0 else None

    embedder, _ = make(script)

    assert (await embedder.embed(texts(100))).requests == 51
    await asyncio.sleep(REMEMBERED_S)
    assert (await embedder.embed(texts(100))).requests == 1


async def test_a_cap_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    embedder, _ = make(
        lambda _, sent: None if len(sent) <= 32 else TooLargeError("HTTP 413", status=413, max_inputs=32)
    )
    await embedder.embed(texts(20_000))
    assert [record.getMessage() for record in caplog.records] == [
        "the provider takes 32 inputs and 300000 tokens a request; remembered"
    ]


async def test_a_cap_that_is_not_named_is_found_by_splitting() -> None:
    embedder, provider = make(lambda _, sent: None if len(sent) <= 32 else BadRequestError("HTTP 422", status=422))

    result = await embedder.embed(texts(256))

    assert result.failures == ()
    assert max(len(sent) for sent in provider.requests[-8:]) == 32


# ---- stopping


@pytest.mark.parametrize("error", [QuotaError("no money", status=429), AuthenticationError("no", status=401)])
async def test_a_fatal_answer_costs_at_most_one_request_a_slot(error: AsyncEmbedError) -> None:
    embedder, provider = make(lambda *_: error, concurrency=4, max_batch_size=1)

    with pytest.raises(type(error)) as caught:
        await embedder.embed(texts(100))

    assert caught.value is error
    assert len(provider.requests) <= 4
    assert len(caught.value.result.failures) == 100


async def test_a_fatal_answer_keeps_what_was_done_and_what_is_under_way() -> None:
    embedder, _ = make(
        lambda number, _: QuotaError("no money", status=429) if number == 5 else None, concurrency=2, max_batch_size=1
    )

    with pytest.raises(QuotaError) as caught:
        await embedder.embed(texts(100))

    result = caught.value.result
    done = [index for index in range(100) if result[index] is not None]
    assert 5 <= len(done) <= 7
    assert_right(result.embeddings, texts(100), failed=result.failed_indices)


async def test_a_request_that_hangs_does_not_hold_up_a_fatal_answer_for_long() -> None:
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


async def test_the_deadline_bounds_everything_and_keeps_what_was_done() -> None:
    embedder, _ = make(max_batch_size=1, concurrency=1)
    started = now()

    with pytest.raises(DeadlineError) as caught:
        await embedder.embed(texts(10), deadline=3.5)

    assert now() - started == pytest.approx(3.5, abs=1e-3)
    assert [caught.value.result[index] is not None for index in range(10)] == [True] * 3 + [False] * 7


async def test_a_wait_beyond_the_deadline_fails_now() -> None:
    embedder, _ = make(lambda *_: RateLimitedError("HTTP 429", status=429, retry_after_s=60.0))
    started = now()

    with pytest.raises(DeadlineError):
        await embedder.embed(["a"], deadline=10.0)

    assert now() - started == pytest.approx(1.0, abs=1e-3)


async def test_a_pause_beyond_the_deadline_of_one_call_holds_for_the_others() -> None:
    embedder, provider = make(
        lambda number, _: RateLimitedError("HTTP 429", status=429, retry_after_s=60.0) if number == 0 else None
    )
    with pytest.raises(DeadlineError):
        await embedder.embed(["a"], deadline=10.0)

    refused_at = now()
    with pytest.raises(DeadlineError):
        await embedder.embed(["a"], deadline=10.0)  # nothing to wait for
    assert now() - refused_at < 0.1

    await embedder.embed(["a"])
    assert provider.sent_at[1] - refused_at >= 60.0


async def test_a_timeout_of_the_providers_own_is_raised_as_it_is() -> None:
    class Foreign(FakeProvider):
        async def embed(self, texts: Sequence[str]) -> Reply:
            raise TimeoutError("the provider's own")

    embedder = Embedder("fake", provider=Foreign())
    for deadline in (None, 10.0):
        with pytest.raises(TimeoutError, match="the provider's own"):
            await embedder.embed(["a"], deadline=deadline)


async def test_the_deadline_counts_the_loading_of_a_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: str | None) -> ByteBound:
        await asyncio.sleep(100)
        return ByteBound()

    monkeypatch.setattr("asyncembed.embedder.embedder.load_counter", hang)
    embedder, _ = make()
    started = now()
    with pytest.raises(DeadlineError):
        await embedder.embed(["long " * 100_000], deadline=5)
    assert now() - started == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize("deadline", [0, -1.0])
async def test_a_deadline_that_has_passed_already_sends_nothing(deadline: float) -> None:
    embedder, provider = make()
    with pytest.raises(DeadlineError):
        await embedder.embed(["a"], deadline=deadline)
    assert provider.requests == []


async def test_a_deadline_that_is_no_number_is_refused() -> None:
    embedder, _ = make()
    with pytest.raises(ConfigError, match="deadline=nan"):
        await embedder.embed(["a"], deadline=math.nan)


async def test_a_fatal_answer_ends_the_counting_too() -> None:
    embedder, _ = make(lambda *_: QuotaError("no money", status=429), latency_s=0)
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


async def test_all_texts_failing_is_an_error_with_their_reasons() -> None:
    embedder, _ = make(lambda *_: BadRequestError("HTTP 400: no", status=400))

    with pytest.raises(AllFailedError) as caught:
        await embedder.embed(["a", "b"])

    assert isinstance(caught.value, RuntimeError)
    assert [failure.index for failure in caught.value.result.failures] == [0, 1]


# ---- long texts


async def test_a_text_that_is_too_long_fails_alone() -> None:
    embedder, provider = make(max_tokens_per_text=10)

    result = await embedder.embed(["short", "x" * 10_000, "also"])

    assert result.failed_indices == [1]
    assert provider.requests == [["short", "also"]]


async def test_the_mean_of_pieces_is_weighted_and_has_unit_length() -> None:
    embedder, provider = make(max_tokens_per_text=10, too_long="mean")
    long = "abcdefghij" * 2 + "klmno"

    result = await embedder.embed(["short", long])

    pieces = [text for sent in provider.requests for text in sent if text != "short"]
    assert "".join(pieces) == long
    total = sum(np.float32(len(piece)) * vector_of(piece) for piece in pieces)
    np.testing.assert_allclose(result.embeddings[1], total / np.linalg.norm(total), rtol=1e-5)


async def test_a_long_text_fails_once_if_one_of_its_pieces_does() -> None:
    embedder, _ = make(
        lambda _, sent: BadRequestError("HTTP 400", status=400) if "klmno" in sent else None,
        max_tokens_per_text=10,
        too_long="mean",
        max_batch_size=1,
    )

    result = await embedder.embed(["short", "abcdefghij" * 2 + "klmno"])

    assert result.failed_indices == [1]


# ---- cancelling


async def test_cancelling_leaves_no_request_and_no_task() -> None:
    embedder, provider = make(concurrency=4, max_batch_size=1)
    call = asyncio.create_task(embedder.embed(texts(100)))
    await asyncio.sleep(2.5)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert provider.in_flight == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    # and the slots are free again
    result = await embedder.embed(texts(8))
    assert result.failures == ()
