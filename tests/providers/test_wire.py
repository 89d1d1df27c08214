"""Calls through the real SDK to a server with faults: which faults pass, which stop the run, and what they cost."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import httpx2
import numpy as np
import pytest

from asyncembed import Embedder
from asyncembed.errors import (
    AsyncEmbedError,
    AuthenticationError,
    CertificateError,
    FatalProviderError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    ProviderDownError,
    QuotaError,
    RedirectRefusedError,
    RequestError,
)
from asyncembed.testing import (
    OLD_VLLM,
    Beside,
    BrokenGzip,
    CutBody,
    Disconnect,
    DuplicateIndex,
    EmbeddingServer,
    ErrorBody200,
    Fault,
    Flood,
    Forbidden,
    ForeignVector,
    Garbage,
    Hang,
    HTMLError,
    HugeHeader,
    Interim,
    InvalidInput,
    InvalidKey,
    MissingIndex,
    NaNVector,
    NotHTTP,
    OtherEncoding,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    Redirect,
    Reset,
    ServerError,
    Shuffled,
    SlowDown,
    Status,
    TooManyTokens,
    TruncatedJSON,
    UnsupportedValue,
    WrongCount,
    WrongDimensions,
    embedding_of,
    every,
    poison,
    script,
)
from tests.providers.raw_server import raw_server

pytestmark = pytest.mark.any_loop

DIMENSIONS = 8
TEXTS = [f"text {number}" for number in range(20)]


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits are tested on the virtual clock; here they would only be waited for."""
    monkeypatch.setattr("asyncembed.sending.retry.BACKOFF_BASE_S", 0.0005)


def make(base_url: str, **options: Any) -> Embedder:
    return Embedder("fake", base_url=base_url, api_key="none", **{"dimensions": DIMENSIONS, **options})


def assert_right(result: Any, failed: tuple[int, ...] = ()) -> None:
    assert result.failed_indices == list(failed)
    for index, text in enumerate(TEXTS):
        if index not in failed:
            np.testing.assert_array_equal(result[index], embedding_of(text, dimensions=DIMENSIONS, model="fake"))


PASSING = [
    *(pytest.param(ServerError(status), 2, id=f"{status}") for status in (500, 502, 503, 504, 520, 529)),
    *(pytest.param(Status(status), 2, id=f"{status}") for status in (408, 409, 424, 425)),
    pytest.param(HTMLError(502), 2, id="a proxy's page"),
    pytest.param(Overloaded(), 2, id="overloaded"),
    pytest.param(SlowDown(), 2, id="slow down"),
    pytest.param(RateLimited(0.01), 2, id="429 without headers"),
    *(
        pytest.param(RateLimited(0.01, headers={"retry-after": value}), 2, id=f"retry-after {value}")
        for value in ("0.01", "0", "-5", "nan", "soon", "Wed, 21 Oct 2015 07:28:00 GMT")
    ),
    pytest.param(RateLimited(0.01, headers={"retry-after-ms": "10"}), 2, id="retry-after-ms"),
    pytest.param(ErrorBody200(), 2, id="200 and an error"),
    *(pytest.param(Garbage(body), 2, id=f"200 and {body[:8]!r}") for body in (b"", b"null", b"[]", b"<html>", b"\xff")),
    pytest.param(Garbage(b"[" * 100_000), 2, id="deep JSON"),
    pytest.param(Garbage(b'{"data": ' + b"9" * 5_000 + b"}"), 2, id="a number of 5,000 digits"),
    pytest.param(WrongCount(-1), 2, id="one fewer"),
    pytest.param(WrongCount(1), 2, id="one more"),
    pytest.param(DuplicateIndex(), 2, id="an index twice"),
    pytest.param(MissingIndex(everywhere=False), 2, id="an index missing"),
    pytest.param(NaNVector(), 2, id="NaN"),
    pytest.param(NaNVector(float("inf")), 2, id="infinity"),
    *(pytest.param(ForeignVector(raw), 2, id=f"a vector {raw!r}") for raw in (b"null", b"[]", b'""')),
    *(pytest.param(ForeignVector(raw), 2, id=f"a vector {raw!r}") for raw in (b'"-_-_"', b'"AAA"', b'"AAAAAA=="')),
    pytest.param(WrongDimensions(7, row=3), 2, id="one vector of another size"),
    pytest.param(WrongDimensions(7), 2, id="all vectors of another size"),
    pytest.param(TruncatedJSON(), 2, id="half a JSON"),
    pytest.param(CutBody(), 2, id="less than was announced"),
    pytest.param(CutBody(chunked=True), 2, id="the last chunk missing"),
    pytest.param(BrokenGzip(), 2, id="half a gzip"),
    pytest.param(NotHTTP(), 2, id="no HTTP"),
    pytest.param(HugeHeader(), 2, id="a header of a megabyte"),
    pytest.param(Flood(), 2, id="blanks without end"),
    pytest.param(Reset(), 2, id="reset"),
    pytest.param(Reset("mid-body"), 2, id="reset in the body"),
    pytest.param(Disconnect(), 2, id="closed"),
    pytest.param(Disconnect("mid-body"), 2, id="closed in the body"),
    pytest.param(TooManyTokens(), 3, id="too many tokens: split"),
    pytest.param(InvalidInput(), 3, id="a 400 once: split"),
    pytest.param(HTMLError(413), 3, id="a proxy's 413: split"),
    pytest.param(Status(422), 3, id="an unknown 422: split"),
    # nothing is wrong with these
    pytest.param(Shuffled(), 1, id="in another order"),
    pytest.param(MissingIndex(everywhere=True), 1, id="no index at all"),
    pytest.param(OtherEncoding(), 1, id="numbers for base64"),
    pytest.param(OtherEncoding(row=1), 1, id="numbers and base64"),
    pytest.param(Beside(without=("usage",)), 1, id="no usage"),
    pytest.param(Beside({"usage": {"prompt_tokens": "five"}}), 1, id="a usage of nonsense"),
    pytest.param(Interim(103), 1, id="early hints"),
]


@pytest.mark.parametrize(("fault", "requests"), PASSING)
async def test_a_fault_that_occurs_once_costs_a_request_and_no_text(fault: Fault, requests: int) -> None:
    async with EmbeddingServer(dimensions=DIMENSIONS, faults=[fault]) as server, make(server.base_url) as embedder:
        result = await embedder.embed(TEXTS)
    assert_right(result)
    assert result.requests == requests


@pytest.mark.parametrize(
    ("fault", "error", "requests"),
    [
        pytest.param(InvalidKey(), AuthenticationError, 1, id="401"),
        pytest.param(Forbidden(), PermissionDeniedError, 1, id="403"),
        pytest.param(HTMLError(404), NotFoundError, 1, id="404"),
        pytest.param(HTMLError(405), RequestError, 1, id="405"),
        pytest.param(Redirect("https://example.com"), RedirectRefusedError, 1, id="307"),
        pytest.param(QuotaExceeded(), QuotaError, 1, id="no money"),
        pytest.param(ServerError(500), ProviderDownError, 9 + 2, id="500"),
        pytest.param(Reset(), ProviderDownError, 9 + 2, id="reset"),
        pytest.param(RateLimited(0.01), ProviderDownError, 9, id="429"),
        # what is malformed every time stays so: three attempts, and two single texts
        pytest.param(Garbage(b"<html>"), ProviderDownError, 3 + 2, id="a page"),
        pytest.param(ErrorBody200(), ProviderDownError, 3 + 2, id="200 and an error"),
        pytest.param(NaNVector(), ProviderDownError, 3 + 2, id="NaN"),
        pytest.param(WrongDimensions(7), ProviderDownError, 3 + 2, id="ignored dimensions"),
    ],
)
async def test_a_permanent_fault_stops_the_run_with_its_error(
    fault: Fault, error: type[FatalProviderError], requests: int
) -> None:
    faults = every(1, fault)
    async with EmbeddingServer(dimensions=DIMENSIONS, faults=faults) as server, make(server.base_url) as embedder:
        with pytest.raises(error) as caught:
            await embedder.embed(TEXTS)
    assert caught.value.result.requests == requests
    assert len(caught.value.result.failures) == len(TEXTS)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        pytest.param(InvalidInput(), AsyncEmbedError, id="400"),
        pytest.param(UnsupportedValue(), AsyncEmbedError, id="500"),
        pytest.param(NaNVector(), ProtocolError, id="NaN"),
        pytest.param(Reset(), AsyncEmbedError, id="reset"),
        pytest.param(ForeignVector(b"null"), ProtocolError, id="null"),
    ],
)
async def test_a_text_that_never_passes_fails_alone(fault: Fault, error: type[AsyncEmbedError]) -> None:
    faults = poison(TEXTS[7], fault)
    async with EmbeddingServer(dimensions=DIMENSIONS, faults=faults) as server, make(server.base_url) as embedder:
        result = await embedder.embed(TEXTS)
    assert_right(result, failed=(7,))
    assert isinstance(result.failures[0].error, error)


async def test_a_request_without_an_answer_times_out_and_is_sent_again() -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, faults=script([Hang(), Hang("mid-body")])) as server,
        make(server.base_url, timeout=0.2) as embedder,
    ):
        assert_right(await embedder.embed(TEXTS))


async def test_a_connection_that_was_closed_after_its_answer_is_replaced_without_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncembed.sending.retry.BACKOFF_BASE_S", 3_600.0)  # a single backoff would not end
    faults = every(1, Disconnect("after"))
    async with EmbeddingServer(dimensions=DIMENSIONS, faults=faults) as server, make(server.base_url) as embedder:
        for _ in range(20):
            assert_right(await embedder.embed(TEXTS))


async def test_a_port_without_a_server_is_an_outage() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ProviderDownError, match="refused"):
            await make(f"http://127.0.0.1:{free.getsockname()[1]}/v1").embed(TEXTS)


async def test_an_untrusted_certificate_is_tried_once() -> None:
    async def never(*_: Any) -> None:
        raise AssertionError

    async with raw_server(never, tls=True) as raw, make(raw.base_url) as embedder:
        with pytest.raises(CertificateError) as caught:
            await embedder.embed(TEXTS)
    assert caught.value.result.requests == 1


async def test_a_client_with_fewer_connections_than_slots_works() -> None:
    limits = httpx2.Limits(max_connections=2)
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, latency_s=0.01) as server,
        httpx2.AsyncClient(limits=limits) as client,
        make(server.base_url, http_client=client, max_batch_size=1) as embedder,
    ):
        result = await embedder.embed(TEXTS)
    assert_right(result)
    assert result.retries == 0
    assert server.connections <= 2


async def test_waiting_for_a_connection_of_a_passed_in_client_is_not_part_of_the_request_timeout() -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, latency_s=0.1) as server,
        httpx2.AsyncClient(limits=httpx2.Limits(max_connections=1)) as client,
        make(server.base_url, http_client=client, max_batch_size=1, timeout=0.5) as embedder,
    ):
        result = await embedder.embed([f"text {number}" for number in range(8)])
    assert (len(result.failures), result.requests, len(server.requests)) == (0, 8, 8)


async def test_a_request_that_is_repeated_for_its_encoding_is_counted_each_time() -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, dialect=OLD_VLLM) as server,
        make(server.base_url) as embedder,
    ):
        result = await embedder.embed([f"text {number}" for number in range(40)])
        stats = embedder.stats()
    assert len(server.requests) == result.requests == stats.requests == 2
    assert result.retries == stats.retries == 1


async def test_the_wall_clock_may_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    hours = iter(range(1_000_000))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(hours) * 3_600.0)
    faults = script([ServerError(500), RateLimited(0.01, headers={"retry-after": "0.01"}), Reset()])
    async with EmbeddingServer(dimensions=DIMENSIONS, faults=faults) as server, make(server.base_url) as embedder:
        assert_right(await embedder.embed(TEXTS, deadline=30))


async def test_the_repr_names_the_host_that_texts_are_sent_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "https://from.environment/v1")
    assert "from.environment" in repr(Embedder("fake", api_key="sk-canary"))
    assert "explicit.example" in repr(Embedder("fake", api_key="sk-canary", base_url="https://explicit.example/v1"))


async def test_fifty_calls_share_an_embedder_and_cancelling_one_ends_no_other() -> None:
    async with (
        EmbeddingServer(dimensions=DIMENSIONS, latency_s=0.05) as server,
        make(server.base_url, concurrency=4) as embedder,
    ):
        calls = [asyncio.create_task(embedder.embed(TEXTS)) for _ in range(50)]
        await server.until(lambda: server.in_flight == 1)  # they are few and the same
        calls[0].cancel()
        calls[49].cancel()
        await asyncio.wait(calls)
    assert [number for number, call in enumerate(calls) if call.cancelled()] == [0, 49]
    for call in calls[1:49]:
        assert_right(call.result())


@pytest.mark.parametrize("fault", [NaNVector(), WrongCount(), DuplicateIndex()])
async def test_tokens_billed_for_an_unusable_reply_are_counted(fault: Fault) -> None:
    async with (
        EmbeddingServer(dimensions=8, faults=script([fault])) as server,
        Embedder("m", base_url=server.base_url, api_key="none") as embedder,
    ):
        result = await embedder.embed([f"text {number}" for number in range(20)])
        assert result.requests > 1
        assert result.total_tokens == server.total_tokens


async def test_an_outage_is_logged_once_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    async with make("http://127.0.0.1:9/v1", max_batch_size=1, max_retries=2) as embedder:
        with pytest.raises(ProviderDownError):
            await embedder.embed([f"text {number}" for number in range(40)])
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message for message in warnings if "Connection refused" in message] == warnings[:1]
