"""The server over real sockets: HTTP, keys, the log, rate limits, latency, and closing."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress

import httpx2
import numpy as np
import openai
import pytest
from openai import AsyncAzureOpenAI, AsyncOpenAI, OpenAI

from asyncembed.batching.tokens import ByteBound
from asyncembed.testing import EmbeddingServer as Server
from asyncembed.testing import Fault, Hang, LoggedRequest, Schedule, ServerFault, embedding_of, script

from .raw import ask, everything, exchange, read_reply, request_bytes

MODEL = "text-embedding-3-small"
BODY = {"model": MODEL, "input": ["a", "b"]}


def sdk(server: Server, key: str = "sk-test") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=server.base_url, api_key=key, max_retries=0)


# ---- clients ----


async def test_the_openai_sdk_understands_the_answers() -> None:
    async with Server() as server, sdk(server) as client:
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            raw = await client.embeddings.with_raw_response.create(
                model=MODEL, input=["a", "b"], dimensions=64, **options
            )
            reply = raw.parse()
            assert reply.usage.total_tokens == 2
            assert raw.headers["openai-processing-ms"].isdigit()
            assert raw.headers["x-request-id"].startswith("req_")
            if options != {"encoding_format": "base64"}:  # the SDK returns base64 undecoded
                rows = np.array([item.embedding for item in reply.data], np.float32)
                assert np.array_equal(rows, [embedding_of(text, dimensions=64) for text in "ab"])


async def test_the_azure_client_and_azure_paths_work() -> None:
    async with Server(api_key="azure-key") as server:
        client = AsyncAzureOpenAI(azure_endpoint=server.url, api_key="azure-key", api_version="2024-10-21")
        async with client:
            reply = await client.embeddings.create(model="my-deployment", input="a")
        assert np.array_equal(np.float32(reply.data[0].embedding), embedding_of("a", model="my-deployment"))
        path = "/openai/deployments/other/embeddings?api-version=2024-10-21"
        named = await exchange(server, request_bytes({"input": "a"}, "api-key: azure-key", path=path))
        assert named.json()["model"] == "other"


async def test_other_paths_and_methods_are_refused() -> None:
    async with Server() as server, httpx2.AsyncClient() as client:
        for path in ("/v1/embeddings", "/embeddings", "/openai/v1/embeddings"):
            assert (await client.post(server.url + path, json=BODY)).status_code == 200
        missing = await client.post(server.url + "/v1/embedding", json=BODY)
        assert (missing.status_code, missing.json()["error"]["message"]) == (404, "Invalid URL (POST /v1/embedding)")
        got = await client.get(server.base_url + "/embeddings")
        assert (got.status_code, got.json()["error"]["code"]) == (405, "method_not_supported")
        assert [request.status for request in server.requests] == [200, 200, 200, 404, 405]


async def test_a_wrong_key_gets_401_with_a_part_of_it_and_a_missing_key_is_named() -> None:
    async with Server(api_key="sk-right") as server:
        async with sdk(server, "sk-wrong-0123456789-abcd") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.embeddings.create(model=MODEL, input="a")
        assert caught.value.code == "invalid_api_key"
        assert "sk-wrong************abcd" in str(caught.value)
        assert "0123456789" not in str(caught.value)
        assert "You didn't provide an API key" in (await ask(server, "a")).body.decode()
        assert (await ask(server, "a", "authorization: Bearer sk-right")).status == 200


# ---- HTTP ----


async def test_a_connection_serves_many_requests_and_survives_an_error() -> None:
    async with Server(max_inputs=1) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port, limit=2**20)
        for texts, status in [(["a"], 200), (["a", "b"], 400), (["a"], 200)]:
            writer.write(request_bytes({"model": MODEL, "input": texts}))
            assert (await read_reply(reader)).status == status
        writer.close()
        assert server.connections == 1
        assert len(server.requests) == 3


async def test_a_request_can_arrive_byte_by_byte_in_chunks_after_100_continue() -> None:
    async with Server() as server:
        body = b'{"model": "m", "input": "a"}'
        chunks = b"5\r\n%b\r\n%x;name=value\r\n%b\r\n0\r\ntrailer: x\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
        raw = b"POST /v1/embeddings HTTP/1.1\r\nTransfer-Encoding: Chunked\r\nExpect: 100-continue\r\n\r\n" + chunks
        reader, writer = await asyncio.open_connection(server.host, server.port, limit=2**20)
        for byte in raw:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await read_reply(reader)).status == 200
        writer.close()


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with Server() as server:
        reader, writer = await asyncio.open_connection(server.host, server.port, limit=2**20)
        writer.write(b"".join(request_bytes({"model": f"m{i}", "input": "a"}) for i in range(3)))
        assert [(await read_reply(reader)).json()["model"] for _ in range(3)] == ["m0", "m1", "m2"]
        writer.close()


@pytest.mark.parametrize("head", ["POST /v1/embeddings HTTP/1.0", "POST /v1/embeddings HTTP/1.1\r\nConnection: close"])
async def test_the_connection_is_closed_when_the_client_wants_that(head: str) -> None:
    async with Server() as server:
        body = b'{"model": "m", "input": "a"}'
        raw = await everything(server, f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        assert b"\r\nconnection: close\r\n" in raw


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST /v1/embeddings HTTP/3.0\r\n\r\n", 505),
        (b"POST /v1/embeddings SPDY\r\n\r\n", 400),
        (b"POST /v1/embeddings HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST /v1/embeddings HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v1/embeddings HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400),
        (b"POST /v1/embeddings HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nx\r\n", 400),
        (b"POST /v1/embeddings HTTP/1.1\r\nx: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"POST /v1/embeddings HTTP/1.1\r\ncontent-length: 1001\r\n\r\n", 413),
        (b"POST /v1/embeddings HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3e9\r\n", 413),
    ],
)
async def test_an_invalid_request_gets_an_error_and_the_connection_closes(raw: bytes, status: int) -> None:
    async with Server(max_body_bytes=1_000) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(raw)
        assert (await read_reply(reader)).status == status
        writer.close()
        assert server.requests == []


async def test_a_request_of_a_megabyte_with_2048_inputs_is_answered() -> None:
    texts = [f"{number} " * 40 for number in range(2_048)]
    async with Server() as server:
        reply = (await ask(server, texts, encoding_format="base64")).json()
        assert len(reply["data"]) == 2_048
        assert server.requests[0].inputs == 2_048
        assert server.requests[0].billed_tokens == reply["usage"]["total_tokens"]


# ---- the log ----


async def test_the_log_has_the_requests_and_their_answers() -> None:
    async with Server(faults=[None, ServerFault()]) as server:
        await ask(server, ["some words", "é"], "x-team: blue", encoding_format="base64", dimensions=9)
        await ask(server, "a")
        first, second = server.requests
        assert (first.number, first.path, first.model, first.status) == (1, "/v1/embeddings", MODEL, 200)
        assert (first.texts, first.inputs) == (("some words", "é"), 2)
        assert (first.tokens, first.estimated_tokens, first.billed_tokens) == (3, 4, 3)  # ⌈10/4⌉ + ⌈2/4⌉
        assert (first.dimensions, first.base64, first.headers["x-team"]) == (9, True, "blue")
        assert (second.fault, second.status, second.billed_tokens) == (ServerFault(), 500, 0)
        assert second.time_s >= first.time_s
        assert server.total_tokens == 3
        assert repr(server).endswith(": 2 requests, 0 in flight>")


async def test_without_a_vocabulary_tokens_are_estimated_not_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_vocabulary(encoding: str) -> ByteBound:
        return ByteBound()

    monkeypatch.setattr("asyncembed.testing.server.load_counter", no_vocabulary)
    async with Server() as server:
        assert (await ask(server, "x" * 8_193 * 4)).status == 400
        assert (await ask(server, "x" * 8_192 * 4)).status == 200  # a bound of 32,768 tokens would refuse it
        assert server.total_tokens == 8_192


async def test_the_repr_of_the_log_shows_neither_texts_nor_headers() -> None:
    async with Server() as server:
        await ask(server, "a secret text", "authorization: Bearer sk-secret")
        assert "secret" not in repr(server.requests)


async def test_with_keep_texts_false_only_schedules_see_the_texts() -> None:
    def schedule(request: LoggedRequest) -> Fault | None:
        return ServerFault() if "bad" in request.texts else None

    async with Server(keep_texts=False, faults=schedule) as server:
        assert (await ask(server, ["bad"])).status == 500
        assert (await ask(server, ["good"])).status == 200
        assert [(request.texts, request.inputs) for request in server.requests] == [((), 1), ((), 1)]


async def test_a_cleared_log_is_empty_and_the_numbering_continues() -> None:
    async with Server() as server:
        await ask(server, "a")
        server.clear()
        assert server.requests == []
        await ask(server, "a")
        assert [request.number for request in server.requests] == [2]


async def test_requests_in_flight_are_never_counted_too_high() -> None:
    async with Server(latency_s=0.02) as server, sdk(server) as client:

        async def four_times() -> None:
            for _ in range(4):
                await client.embeddings.create(model=MODEL, input="a")

        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(four_times())
        # a request ends before its client can send the next one, so five callers are never counted as six
        assert server.max_in_flight == 5
        assert server.in_flight == 0


async def test_a_request_whose_client_disconnects_is_no_longer_in_flight() -> None:
    async with Server(latency_s=30) as server, sdk(server) as client:
        call = asyncio.create_task(client.embeddings.create(model=MODEL, input="a"))
        await server.until(lambda: server.in_flight == 1)
        call.cancel()
        await server.until(lambda: server.in_flight == 0)
        assert server.requests[0].status is None
        assert server.total_tokens == 0


# ---- latency and rate limits ----


async def test_latency_has_a_fixed_part_and_a_part_per_token() -> None:
    async with Server(latency_s=0.05, latency_per_token_s=0.01) as server:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        await ask(server, "a b c d e")
        assert loop.time() - begun_s >= 0.05 + 5 * 0.01 - 0.005  # a timer may come a tick early


async def test_a_refusal_is_sent_without_the_latency() -> None:
    async with Server(latency_s=600, max_inputs=1) as server:  # the test's own timeout is a minute
        assert (await ask(server, ["a", "b"])).status == 400


async def test_a_request_sent_during_the_latency_of_another_ends_the_connection() -> None:
    async with Server(latency_s=0.05) as server:
        raw = await everything(server, request_bytes({"model": "m", "input": "a", "dimensions": 1}) * 2)
        assert raw.count(b"HTTP/1.1 200 OK") == 1
        assert b"\r\nconnection: close\r\n" in raw


async def test_too_many_tokens_a_minute_get_openais_429() -> None:
    # 60 tokens a minute: none of the test's time refills a whole token
    async with Server(tokens_per_minute=60, count_tokens=lambda texts: [40] * len(texts)) as server:
        granted = await ask(server, "a")
        assert granted.status == 200
        assert granted.headers["x-ratelimit-limit-tokens"] == "60"
        assert granted.headers["x-ratelimit-remaining-tokens"] == "20"
        refused = await ask(server, "a")
        assert refused.status == 429
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded")
        where = f"Rate limit reached for {MODEL} in organization org-asyncembed on tokens per min (TPM): Limit 60, "
        assert error["message"].startswith(where + "Used ")
        assert ", Requested 40. Please try again in " in error["message"]
        assert 15 <= int(refused.headers["retry-after"]) <= 20  # 20 tokens at one a second
        assert 15_000 < int(refused.headers["retry-after-ms"]) <= 20_000
        too_large = (await ask(server, ["a", "b"])).json()["error"]["message"]
        assert too_large.startswith(f"Request too large for {MODEL} in organization")
        assert "Limit 60, Requested 80." in too_large


async def test_requests_refused_for_their_content_count_as_requests() -> None:
    async with Server(requests_per_minute=2, max_inputs=1) as server:
        assert [(await ask(server, texts)).status for texts in (["a", "b"], "a", "a")] == [400, 200, 429]
        error = (await ask(server, "a")).json()["error"]
        assert error["type"] == "requests"
        assert "on requests per min (RPM): Limit 2, Used " in error["message"]


async def test_the_tokens_of_a_refused_request_are_not_taken() -> None:
    async with Server(tokens_per_minute=60, max_inputs=1, count_tokens=lambda texts: [50] * len(texts)) as server:
        assert (await ask(server, ["a", "b"])).status == 400
        assert (await ask(server, "a")).status == 200


async def test_the_faults_can_be_replaced_while_the_server_runs() -> None:
    async with Server() as server:
        assert (await ask(server, "a")).status == 200
        server.faults = script([ServerFault(503)])
        assert (await ask(server, "a")).status == 503


# ---- closing ----


async def test_closing_ends_hanging_half_read_and_idle_connections() -> None:
    before = threading.active_count(), len(asyncio.all_tasks())
    async with Server(faults=[Hang(), Hang("mid-body")]) as server:
        connections = [await asyncio.open_connection(server.host, server.port) for _ in range(5)]
        for (_, writer), raw in zip(
            connections, [request_bytes(BODY), request_bytes(BODY), b"POST /v1", request_bytes(BODY)[:-5]], strict=False
        ):
            writer.write(raw)
        await server.until(lambda: server.in_flight == 2)
        assert server.connections == 5
    for reader, writer in connections:
        with suppress(ConnectionResetError):  # the connection ends by a close or by a reset
            await reader.read()
        writer.close()
    assert (threading.active_count(), len(asyncio.all_tasks())) == before
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(server.host, server.port)


async def test_a_closed_server_can_be_started_again_on_its_port() -> None:
    server = Server()
    async with server:
        url = server.base_url
        await ask(server, "a")
    assert repr(server) == "<EmbeddingServer closed: 1 requests, 0 in flight>"
    await server.aclose()  # again: nothing happens
    async with server:
        assert server.base_url == url
        assert (await ask(server, "a")).status == 200


async def test_an_error_in_a_schedule_is_raised_when_the_server_closes() -> None:
    def broken(request: LoggedRequest) -> Fault | None:
        raise ZeroDivisionError("in the schedule")

    schedule: Schedule = broken
    with pytest.raises(ZeroDivisionError, match="in the schedule"):
        async with Server(faults=schedule) as server:
            with pytest.raises(asyncio.IncompleteReadError):
                await ask(server, "a")


def test_the_server_runs_in_a_thread_for_code_that_is_not_async() -> None:
    threads = threading.active_count()
    with Server().in_thread() as server, OpenAI(base_url=server.base_url, api_key="any") as client:
        reply = client.embeddings.create(model=MODEL, input="a")
        assert np.array_equal(np.float32(reply.data[0].embedding), embedding_of("a"))
        assert [request.status for request in server.requests] == [200]
    assert threading.active_count() == threads


def test_in_thread_raises_the_error_of_a_server_that_cannot_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="address already in use"), Server(port=port).in_thread():
            pytest.fail("it started on a port that was taken")


def test_an_error_in_the_with_block_of_in_thread_ends_the_thread_and_is_raised() -> None:
    threads = threading.active_count()
    with pytest.raises(KeyError), Server().in_thread():
        raise KeyError("body")
    assert threading.active_count() == threads
