"""`isolation`: a bad text fails alone, and an outage is not blamed on texts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from asyncembed.batching.batch import Batch
from asyncembed.batching.texts import Text
from asyncembed.errors import (
    AsyncEmbedError,
    BadRequestError,
    ProtocolError,
    ProviderDownError,
    RateLimitedError,
    RejectedTextError,
    RequestError,
    ServerError,
    TransportError,
)
from asyncembed.sending.isolation import FailureRecord, Isolation, split_batch
from tests.fakes import assert_vectors, make_embedder, now, texts

# ---- values


def batch_of(*contents: str) -> Batch:
    return Batch([Text(content, (index,), tokens=1, weight=1) for index, content in enumerate(contents)])


def record_of(*successes: int) -> FailureRecord:
    """Return the record of a batch that failed at these counts of successes of other requests."""
    record = FailureRecord()
    for each in successes:
        record.add(each)
    return record


def test_failures_are_consecutive_until_another_request_succeeds() -> None:
    record = record_of(3, 3, 5, 5, 5)
    assert (record.failures, record.consecutive_failures) == (5, 3)


@pytest.mark.parametrize(
    ("inputs", "failed_at", "now_at", "expected"),
    [
        pytest.param(64, [3], 3, False, id="no success since the failure"),
        pytest.param(64, [3], 4, True, id="a success after it"),
        pytest.param(64, [3, 4, 4], 4, True, id="a success after the first failure"),
        pytest.param(1, [3], 3, False, id="one text, no success since the failure"),
        pytest.param(1, [3], 4, True, id="one text, a success after it"),
        pytest.param(1, [3, 4], 4, True, id="one text, a success between the last two failures"),
        pytest.param(1, [3, 4, 4], 4, False, id="one text, no success between the last two failures"),
        pytest.param(1, [3, 4, 4], 5, True, id="one text, a success after the last failure"),
    ],
)
def test_a_success_of_others_counts_since_the_first_failure_or_for_one_text_since_the_last_but_one(
    inputs: int, failed_at: list[int], now_at: int, expected: bool
) -> None:
    assert record_of(*failed_at).others_succeeded_since(inputs, now_at) is expected


def test_a_part_keeps_the_failures_of_its_batch_and_a_single_text_gets_all_its_attempts_again() -> None:
    inputs = batch_of("a", "b", "c").inputs
    record = record_of(3, 3, 3)
    record.probes, record.suspect, record.isolating = 2, inputs[0], True

    part, single = record.for_part(inputs[:2]), record.for_part(inputs[2:])

    assert (part.failures, part.consecutive_failures) == (3, 3)
    assert (part.probes, part.suspect, part.isolating) == (0, None, False)
    assert (single.failures, single.consecutive_failures, single.successes_at_last) == (0, 0, None)


def test_without_a_known_good_text_the_batchs_own_texts_are_probes_from_both_ends_in_turn() -> None:
    isolation, batch, record = Isolation(), batch_of("a", "b", "c", "d", "e"), FailureRecord()
    probes = [isolation.next_probe(batch, record) for _ in range(6)]
    assert [probe.inputs[0].content for probe, _ in probes] == ["a", "e", "b", "d", "c", "c"]
    assert all(probe.sent and is_own for probe, is_own in probes)
    assert isolation.probes_needed == 2


def test_the_shortest_text_that_has_succeeded_is_the_probe_and_belongs_to_no_row() -> None:
    isolation, record = Isolation(good_batch=batch_of("long", "s", "longer")), FailureRecord()
    probe, is_own = isolation.next_probe(batch_of("bad"), record)
    assert [(each.content, list(each.text.indices)) for each in probe.inputs] == [("s", [])]
    assert (probe.sent, is_own, record.probes, isolation.probes_needed) == (True, False, 0, 1)


@pytest.mark.parametrize(
    ("contents", "suspect", "parts"),
    [
        pytest.param("abcd", None, ["ab", "cd"], id="even"),
        pytest.param("abc", None, ["ab", "c"], id="odd"),
        pytest.param("abcd", 2, ["c", "abd"], id="a suspect"),
        pytest.param("a", 0, ["a"], id="nothing but the suspect"),
    ],
)
def test_a_batch_is_split_into_halves_or_into_its_suspect_and_the_rest(
    contents: str, suspect: int | None, parts: list[str]
) -> None:
    batch, record = batch_of(*contents), record_of(3, 3)
    batch.sent = True
    record.suspect = None if suspect is None else batch.inputs[suspect]

    split = split_batch(batch, record)

    assert ["".join(each.content for each in part.inputs) for part, _ in split] == parts
    assert all(part.sent for part, _ in split)
    assert [its_record.failures for _, its_record in split] == [0 if len(part) == 1 else 2 for part in parts]


# ---- through `Embedder`


@pytest.mark.virtual_time
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
async def test_one_bad_text_among_2048_costs_one_text_and_few_requests(position: int, error: AsyncEmbedError) -> None:
    expected = texts(2_048)
    poison = expected[position]
    embedder, provider = make_embedder(lambda _, sent: error if poison in sent else None)

    result = await embedder.embed(expected)

    assert result.failed_indices == [position]
    assert_vectors(result.embeddings, expected, failed=[position])
    # a 400 is split at once: 2·log2(2048) = 22. The others: 2 more attempts, 2 probes, 22 parts, 4 for the bad text.
    assert len(provider.requests) - 1 <= (22 if isinstance(error, BadRequestError) else 30)


@pytest.mark.virtual_time
@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("one_in", [100, 20, 4])
@pytest.mark.parametrize(
    "error", [ServerError("HTTP 500", status=500), ProtocolError("expected finite numbers")], ids=["500", "NaN"]
)
async def test_texts_that_cause_errors_fail_alone(error: AsyncEmbedError, one_in: int, concurrency: int) -> None:
    expected = texts(2_048)
    poisons = {text for index, text in enumerate(expected) if index % one_in == one_in // 2}
    embedder, provider = make_embedder(
        lambda _, sent: error if poisons & set(sent) else None, latency_s=0.01, concurrency=concurrency
    )

    result = await embedder.embed(expected)

    failed = [index for index, text in enumerate(expected) if text in poisons]
    assert result.failed_indices == failed
    assert_vectors(result.embeddings, expected, failed=failed)
    # each is found by halving (22 requests, shared with its neighbours) and then attempted five times
    assert len(provider.requests) < 4 * 2_048
    assert len(provider.requests) < len(poisons) * (22 + 5)


@pytest.mark.virtual_time
async def test_an_outage_during_isolation_fails_no_good_text() -> None:
    start = now()
    expected = texts(256)

    def script(_: int, sent: Sequence[str]) -> AsyncEmbedError | None:
        # after some seconds the search is down to single texts; then all requests fail for most of a minute
        down = 4 < now() - start < 50
        return ServerError("HTTP 500", status=500) if down or "text 77" in sent else None

    embedder, _ = make_embedder(script, latency_s=0.1, concurrency=2)

    result = await embedder.embed(expected)

    assert result.failed_indices == [77]


@pytest.mark.virtual_time
async def test_a_call_whose_texts_all_fail_ends_early_while_another_call_succeeds() -> None:
    embedder, provider = make_embedder(
        lambda _, sent: ServerError("HTTP 500", status=500) if "bad" in sent[0] else None, max_batch_size=100
    )
    bad = [f"bad {number}" for number in range(200)]

    async with asyncio.TaskGroup() as group:
        good = group.create_task(embedder.embed(texts(10_000)))
        with pytest.raises(RuntimeError) as caught:
            await embedder.embed(bad)

    assert good.result().failures == ()
    assert len(caught.value.result.failures) == 200  # type: ignore[attr-defined]
    # after some texts it is clear that all of them fail
    assert sum("bad" in sent[0] for sent in provider.requests) < 200


@pytest.mark.virtual_time
async def test_texts_that_are_refused_fail_alone() -> None:
    expected = texts(500)
    poisons = {f"text {number}" for number in (0, 1, 2, 77, 250, 498, 499)}
    embedder, _ = make_embedder(
        lambda _, sent: BadRequestError("HTTP 400", status=400) if poisons & set(sent) else None
    )

    result = await embedder.embed(expected)

    failed = [index for index, text in enumerate(expected) if text in poisons]
    assert result.failed_indices == failed
    assert all(isinstance(failure.error, RejectedTextError) for failure in result.failures)
    assert_vectors(result.embeddings, expected, failed=failed)


@pytest.mark.virtual_time
async def test_an_outage_in_the_middle_of_a_call_is_not_blamed_on_texts() -> None:
    embedder, provider = make_embedder(
        lambda number, _: ServerError("HTTP 500", status=500) if number >= 20 else None, max_batch_size=64
    )

    with pytest.raises(ProviderDownError) as caught:
        await embedder.embed(texts(64 * 100))

    result = caught.value.result
    assert all(isinstance(failure.error, ProviderDownError) for failure in result.failures)
    assert len(result.failures) == 64 * 80
    assert len(provider.requests) - 20 <= 16 * (9 + 2)


@pytest.mark.virtual_time
async def test_random_faults_fail_no_good_text() -> None:
    dice = random.Random(7)
    faults = [
        ServerError("HTTP 500", status=500),
        ServerError("HTTP 503", status=503),
        TransportError("lost"),
        ProtocolError("expected 3 embeddings, got 2"),
        RateLimitedError("HTTP 429", status=429, retry_after_s=0.5),
    ]
    embedder, _ = make_embedder(lambda *_: dice.choice(faults) if dice.random() < 0.3 else None, max_batch_size=50)

    result = await embedder.embed(texts(5_000))

    assert result.failures == ()
    assert_vectors(result.embeddings, texts(5_000))


@pytest.mark.virtual_time
async def test_the_bad_one_of_two_texts_is_found() -> None:
    embedder, _ = make_embedder(lambda _, sent: ServerError("HTTP 500", status=500) if "bad" in sent else None)

    result = await embedder.embed(["good", "bad"])

    assert result.failed_indices == [1]


@pytest.mark.virtual_time
async def test_a_provider_that_refuses_everything_is_not_sent_every_text() -> None:
    embedder, provider = make_embedder(lambda *_: BadRequestError("HTTP 400: no", status=400), concurrency=2)

    with pytest.raises(RequestError) as caught:
        await embedder.embed(texts(5_000))

    assert len(provider.requests) < 100
    assert len(caught.value.result.failures) == 5_000
