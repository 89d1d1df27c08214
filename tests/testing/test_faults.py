"""Every fault sends the bytes that its docstring describes, and the next request is answered correctly."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from asyncembed.testing import (
    OPENAI,
    Beside,
    BrokenGzip,
    CutBody,
    Disconnect,
    Drip,
    DuplicateIndex,
    EmbeddingServer,
    ErrorBody200,
    Fault,
    Float64,
    Flood,
    Forbidden,
    ForeignVector,
    Garbage,
    GzipBomb,
    Hang,
    HTMLError,
    HugeHeader,
    Interim,
    InvalidInput,
    InvalidKey,
    Late,
    MissingIndex,
    NaNVector,
    NotHTTP,
    OtherEncoding,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    Redirect,
    Reset,
    ServerFault,
    Shuffled,
    SlowDown,
    Status,
    TooManyTokens,
    TruncatedJSON,
    UnsupportedValue,
    WrongCount,
    WrongDimensions,
    embedding_of,
)

from .raw import ask, everything, read_reply, request_bytes

TEXTS = ["a", "b", "c", "d"]
REQUEST = request_bytes({"model": "m", "input": TEXTS, "dimensions": 8})


# ---- other answers in place of vectors ----


@pytest.mark.parametrize(
    ("fault", "status", "kind", "code", "fragment"),
    [
        (RateLimited(1.5), 429, "tokens", "rate_limit_exceeded", "Please try again in 1.5s."),
        (SlowDown(), 429, "rate_limit_error", "slow_down", "slow down"),
        (QuotaExceeded(), 429, "insufficient_quota", "insufficient_quota", "You exceeded your current quota"),
        (QuotaExceeded("credit_balance_exhausted"), 429, "insufficient_quota", "credit_balance_exhausted", "quota"),
        (InvalidKey(), 401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided: sk-"),
        (Forbidden(), 403, "request_forbidden", "unsupported_country_region_territory", "not supported"),
        (InvalidInput(), 400, "invalid_request_error", None, "'$.input' is invalid"),
        (TooManyTokens(9), 400, *["max_tokens_per_request"] * 2, "Requested 9 tokens, max 300000 tokens per request"),
        (ServerFault(), 500, "server_error", None, "The server had an error"),
        (ServerFault(522), 522, "server_error", None, "The server had an error"),
        (Overloaded(), 503, "service_unavailable_error", "server_is_overloaded", "overloaded"),
        (UnsupportedValue(), 500, "api_error", None, "unsupported value: NaN"),
        (Status(418, message="tea", type="t", code="c"), 418, "t", "c", "tea"),
        (ErrorBody200(), 200, "server_error", None, "upstream failed"),
    ],
)
async def test_errors_have_the_apis_status_and_body(
    fault: Fault, status: int, kind: str, code: str | None, fragment: str
) -> None:
    async with EmbeddingServer(faults=[fault]) as server:
        reply = await ask(server, "a")
        error = reply.json()["error"]
        assert (reply.status, error["type"], error["code"]) == (status, kind, code)
        assert fragment in error["message"]
        assert (await ask(server, "a")).status == 200
        assert [(request.fault, request.billed_tokens) for request in server.requests] == [(fault, 0), (None, 1)]


@pytest.mark.parametrize(
    ("fault", "status", "headers", "body"),
    [
        (RateLimited(headers={"retry-after": "soon"}), 429, {"retry-after": "soon"}, None),
        (Overloaded(retry_after="7"), 503, {"retry-after": "7"}, None),
        (Status(429, {"retry-after-ms": "250"}, {"a": 1}), 429, {"retry-after-ms": "250"}, b'{"a": 1}'),
        (Status(502, body="<html>"), 502, {"content-type": "text/plain"}, b"<html>"),
        (
            Status(200, {"content-type": "application/json"}, b"\xff"),
            200,
            {"content-type": "application/json"},
            b"\xff",
        ),
        (Status(204, body=b""), 204, {}, b""),
        (HTMLError(413), 413, {"content-type": "text/html"}, None),
        (Redirect("http://127.0.0.1:9/v1"), 307, {"location": "http://127.0.0.1:9/v1"}, b""),
        (Garbage(b"null"), 200, {"content-type": "application/json"}, b"null"),
    ],
)
async def test_headers_and_bodies_are_sent_unchanged(
    fault: Fault, status: int, headers: dict[str, str], body: bytes | None
) -> None:
    async with EmbeddingServer(faults=[fault]) as server:
        reply = await ask(server, "a")
        assert reply.status == status
        assert headers.items() <= reply.headers.items()
        assert body is None or reply.body == body


async def test_a_fault_comes_before_limits_keys_and_rates() -> None:
    async with EmbeddingServer(faults=[ServerFault()], api_key="k", requests_per_minute=1) as server:
        assert (await ask(server, "")).status == 500
        assert (await ask(server, "a", "authorization: Bearer k")).status == 200


async def test_the_openai_sdk_raises_the_matching_errors() -> None:
    faults = [QuotaExceeded(), InvalidKey(), InvalidInput(), Overloaded(), Garbage(b"{}")]
    expected = [
        openai.RateLimitError,
        openai.AuthenticationError,
        openai.BadRequestError,
        openai.InternalServerError,
        ValueError,
    ]
    async with (
        EmbeddingServer(faults=faults) as server,
        openai.AsyncOpenAI(base_url=server.base_url, api_key="any", max_retries=0) as client,
    ):
        for kind in expected:
            with pytest.raises(kind):
                await client.embeddings.create(model="m", input="a")


# ---- altered vectors ----


async def altered(fault: Fault, encoding: str = "float") -> dict[str, Any]:
    async with EmbeddingServer(faults=[fault]) as server:
        reply = await ask(server, TEXTS, dimensions=8, encoding_format=encoding)
        assert reply.status == 200
        assert server.total_tokens == 4  # an altered reply is billed
        return dict(reply.json())


def indices(reply: dict[str, Any]) -> list[object]:
    return [item.get("index", "none") for item in reply["data"]]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (WrongCount(-1), [0, 1, 2]),
        (WrongCount(2), [0, 1, 2, 3, 4, 5]),
        (WrongCount(-9), []),
        (DuplicateIndex(), [0, 1, 2, 0]),
        (MissingIndex(), ["none", 1, 2, 3]),
        (MissingIndex(everywhere=True), ["none"] * 4),
    ],
)
async def test_count_and_indices_can_be_wrong(fault: Fault, expected: list[object]) -> None:
    assert indices(await altered(fault)) == expected


async def test_a_shuffled_reply_has_correct_indices() -> None:
    reply = await altered(Shuffled(seed=1))
    assert indices(reply) != [0, 1, 2, 3]
    for item in reply["data"]:
        expected = embedding_of(TEXTS[item["index"]], dimensions=8)
        assert np.array_equal(np.array(item["embedding"], np.float32), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_one_number_can_be_nan_or_infinite_in_both_encodings(value: float, encoding: str) -> None:
    reply = await altered(NaNVector(value, row=2), encoding)
    rows = [item["embedding"] for item in reply["data"]]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert [bool(np.isfinite(row).all()) for row in rows] == [True, True, False, True]
    assert len(rows[2]) == 8
    np.testing.assert_equal(rows[2][0], value)


async def test_dimensions_can_be_wrong_in_all_rows_or_one() -> None:
    sizes = [len(item["embedding"]) for item in (await altered(WrongDimensions(5)))["data"]]
    assert sizes == [5] * 4
    sizes = [len(item["embedding"]) for item in (await altered(WrongDimensions(9, row=1)))["data"]]
    assert sizes == [8, 9, 8, 8]


@pytest.mark.parametrize(("raw", "value"), [(b"null", None), (b"[]", []), (b'"%%"', "%%"), (b'["a"]', ["a"])])
async def test_a_row_can_be_any_json(raw: bytes, value: object) -> None:
    rows = [item["embedding"] for item in (await altered(ForeignVector(raw, row=-1)))["data"]]
    assert rows[3] == value
    assert [len(row) for row in rows[:3]] == [8, 8, 8]


async def test_replaced_rows_keep_the_order_of_the_dialect() -> None:
    dialect = replace(OPENAI, shuffles=True)
    async with EmbeddingServer(faults=[OtherEncoding(), OtherEncoding(row=-1)], dialect=dialect) as server:
        for _ in range(2):
            reply = (await ask(server, TEXTS, dimensions=8, encoding_format="base64")).json()
            assert indices(reply) == [3, 2, 1, 0]
            assert np.array_equal(np.float32(reply["data"][3]["embedding"]), embedding_of("a", dimensions=8))


async def test_encodings_can_be_swapped_mixed_or_float64() -> None:
    kinds = [type(item["embedding"]) for item in (await altered(OtherEncoding()))["data"]]
    assert kinds == [str] * 4
    mixed = [type(item["embedding"]) for item in (await altered(OtherEncoding(row=2), "base64"))["data"]]
    assert mixed == [str, str, list, str]
    wide = (await altered(Float64(), "base64"))["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(wide), "<f8"), embedding_of("a", dimensions=8))


async def test_the_keys_beside_the_data_can_be_wrong_or_missing() -> None:
    reply = await altered(Beside({"usage": {"prompt_tokens": "4"}, "model": "another"}))
    assert (reply["usage"], reply["model"]) == ({"prompt_tokens": "4"}, "another")
    assert "usage" not in await altered(Beside(without=("usage",)))


# ---- disturbed delivery ----


@dataclass(frozen=True)
class Delivery:
    """The part of an answer that arrived before the server closed the connection."""

    promised: int
    body: bytes


async def delivery(fault: Fault) -> Delivery:
    async with EmbeddingServer(faults=[fault]) as server:
        raw = await everything(server, REQUEST)
        assert server.requests[0].status is None  # no whole answer
        assert server.in_flight == 0
        assert (await ask(server, "a")).status == 200
    head, _, body = raw.partition(b"\r\n\r\n")
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return Delivery(int(length or 0), body)


async def test_a_connection_can_end_before_the_first_byte() -> None:
    assert await delivery(Disconnect()) == Delivery(0, b"")


async def test_a_body_can_end_in_the_middle_although_the_head_announces_all_of_it() -> None:
    for fault in (Disconnect("mid-body"), CutBody()):
        came = await delivery(fault)
        assert len(came.body) == came.promised // 2 > 100
    assert (await delivery(CutBody(7))).body == b'{"data"'


async def test_chunks_can_end_without_the_last_one() -> None:
    assert (await delivery(CutBody(7, chunked=True))).body == b'7\r\n{"data"\r\n'


async def test_an_answer_can_be_something_other_than_http() -> None:
    async with EmbeddingServer(faults=[NotHTTP(b"220 smtp\r\n")]) as server:
        assert await everything(server, REQUEST) == b"220 smtp\r\n"


@pytest.mark.parametrize("when", ["before", "mid-body"])
async def test_a_connection_can_be_reset(when: Any) -> None:
    async with EmbeddingServer(faults=[Reset(when)]) as server:
        with pytest.raises(ConnectionResetError):
            await everything(server, REQUEST)
        assert server.requests[0].status is None


async def test_a_kept_connection_can_be_dead_for_the_next_request() -> None:
    async with EmbeddingServer(faults=[Disconnect("after")]) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(REQUEST)
        first = await read_reply(reader)
        assert first.status == 200
        assert "connection" not in first.headers
        writer.write(REQUEST)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await read_reply(reader)
        writer.close()
        assert [request.status for request in server.requests] == [200]


async def test_disconnect_after_an_answer_respects_connection_close() -> None:
    async with EmbeddingServer(faults=[Disconnect("after")]) as server:
        raw = await everything(server, request_bytes({"model": "m", "input": "a"}, "connection: close"))
        assert raw.startswith(b"HTTP/1.1 200 OK")


async def test_a_hang_lasts_until_the_client_disconnects() -> None:
    impatient = httpx2.Timeout(30, read=0.05)
    async with (
        EmbeddingServer(faults=[Hang(), Hang("mid-body")]) as server,
        httpx2.AsyncClient(timeout=impatient) as client,
    ):
        for _ in range(2):
            with pytest.raises(httpx2.ReadTimeout):
                await client.post(server.base_url + "/embeddings", json={"model": "m", "input": TEXTS})
        await server.until(lambda: server.in_flight == 0)
        assert [request.status for request in server.requests] == [None, None]


async def test_a_hang_in_the_middle_sends_half_of_the_body_first() -> None:
    async with EmbeddingServer(faults=[Hang("mid-body")]) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        promised = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert len(await reader.readexactly(promised // 2)) == promised // 2
        assert server.in_flight == 1
        writer.close()


async def test_a_dripping_answer_is_complete_and_each_wait_is_short() -> None:
    # 20 drips a second, 10,000 bytes a second: 500 bytes each, a few of them
    async with EmbeddingServer(faults=[Drip(10_000)]) as server, httpx2.AsyncClient() as client:
        reply = await client.post(
            server.base_url + "/embeddings", json={"model": "m", "input": TEXTS, "dimensions": 8}, timeout=5
        )
        assert len(reply.json()["data"]) == 4
        assert server.requests[0].status == 200


async def test_a_drip_ends_when_the_client_disconnects() -> None:
    async with EmbeddingServer(faults=[Drip(20)]) as server:  # a byte every 50 ms: half a minute
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(REQUEST)
        await reader.readexactly(2)
        writer.close()
        await server.until(lambda: server.in_flight == 0)
        assert server.requests[0].status is None


async def test_a_late_answer_is_correct() -> None:
    async with EmbeddingServer(faults=[Late(0.05)]) as server:
        begun_s = asyncio.get_running_loop().time()
        assert len((await ask(server, TEXTS)).json()["data"]) == 4
        assert asyncio.get_running_loop().time() - begun_s >= 0.045  # a timer may come a tick early


async def test_json_can_end_too_early_inside_correct_http() -> None:
    async with EmbeddingServer(faults=[TruncatedJSON(), TruncatedJSON(3)]) as server:
        half = await ask(server, TEXTS)
        assert half.status == 200
        with pytest.raises(json.JSONDecodeError):
            half.json()
        assert (await ask(server, TEXTS)).body == b'{"d'


async def test_gzip_can_be_cut_or_corrupt() -> None:
    async with EmbeddingServer(faults=[BrokenGzip(), BrokenGzip(corrupt=True)]) as server:
        cut = await ask(server, TEXTS)
        assert cut.headers["content-encoding"] == "gzip"
        with pytest.raises(EOFError):
            gzip.decompress(cut.body)
        with pytest.raises((zlib.error, gzip.BadGzipFile)):
            gzip.decompress((await ask(server, TEXTS)).body)


async def test_a_gzip_bomb_is_small_and_unpacks_to_its_size() -> None:
    async with EmbeddingServer(faults=[GzipBomb(2_500_000)]) as server:
        reply = await ask(server, "a")
        assert len(reply.body) < 10_000
        assert gzip.decompress(reply.body) == b" " * 2_500_000


async def test_a_flood_ends_when_the_client_disconnects() -> None:
    async with EmbeddingServer(faults=[Flood()]) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(REQUEST)
        await reader.readexactly(1_000_000)
        assert server.in_flight == 1
        writer.transport.abort()
        await server.until(lambda: server.in_flight == 0)


async def test_interim_answers_and_a_huge_header_precede_a_correct_answer() -> None:
    async with EmbeddingServer(faults=[Interim(103), Interim(100), HugeHeader(50_000)]) as server:
        async with httpx2.AsyncClient() as client:
            for _ in range(3):
                reply = await client.post(server.base_url + "/embeddings", json={"model": "m", "input": "a"})
                assert reply.status_code == 200
        assert len(reply.headers["x-padding"]) == 50_000


async def test_a_users_own_fault_is_a_subclass_with_one_method() -> None:
    @dataclass(frozen=True)
    class Teapot(Status):
        status: int = 418

    async with EmbeddingServer(faults=[Teapot(), Fault()]) as server:
        assert (await ask(server, "a")).status == 418
        assert (await ask(server, "a")).status == 200  # the base class changes nothing
