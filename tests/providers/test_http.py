"""The connections that carry requests: which are reused, which are closed, and how servers can misuse them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp.client_proto
import httpx2
import numpy as np
import pytest

from asyncembed.errors import ProtocolError, RateLimitedError, TransportError
from asyncembed.providers import http
from asyncembed.providers.http import PIECE_BYTES, Transport, read

from .helpers import plain, provider_at
from .raw_server import SELF_SIGNED, Act, RawServer, good_answer, raw_server


async def answer(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(raw.bodies[-1]))
    await writer.drain()


def head_and_body(answer: bytes) -> tuple[bytes, bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


async def ask_twice(act: Act, **options: Any) -> int:
    """Send two requests, one after the other; return how many connections that took."""
    async with raw_server(act) as raw:
        provider = provider_at(raw.base_url, **options)
        for text in ("first", "second"):
            reply = await provider.embed([text])
            np.testing.assert_allclose(reply.vectors, plain(text), rtol=1e-6)
            await asyncio.sleep(0.02)  # for the server to close the connection, or to send more on it
            for _ in range(5):  # and for the loop to read that, if both woke up in the same iteration
                await asyncio.sleep(0)
        await provider.aclose()
        return raw.connections


async def chunked(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    _, body = head_and_body(good_answer(raw.bodies[-1]))
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for start in range(0, len(body), 7):
        chunk = body[start : start + 7]
        writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def byte_by_byte(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    whole = good_answer(raw.bodies[-1])
    for place in range(len(whole)):
        writer.write(whole[place : place + 1])
        await writer.drain()
        await asyncio.sleep(0)


async def after_interim_answers(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
    await answer(raw, writer)


@pytest.mark.parametrize("act", [answer, chunked, byte_by_byte, after_interim_answers])
async def test_a_connection_is_reused_after_a_complete_answer(act: Act) -> None:
    assert await ask_twice(act) == 1


async def told_to_close(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(raw.bodies[-1], extra="Connection: Close\r\n"))
    await writer.drain()


async def told_both(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(raw.bodies[-1], extra="connection: close\r\nconnection: keep-alive\r\n"))
    await writer.drain()


async def closed_in_silence(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    await answer(raw, writer)
    writer.close()


async def as_http_1_0(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    head, body = head_and_body(good_answer(raw.bodies[-1]))
    writer.write(head.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n\r\n" + body)
    await writer.drain()


async def until_the_end(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + head_and_body(good_answer(raw.bodies[-1]))[1])
    await writer.drain()
    writer.close()


async def and_something_unasked(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(raw.bodies[-1]) + b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
    await writer.drain()


async def something_unasked_later(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    await answer(raw, writer)
    await asyncio.sleep(0.01)
    writer.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
    await writer.drain()


@pytest.mark.parametrize(
    "act",
    [
        told_to_close,
        told_both,
        closed_in_silence,
        as_http_1_0,
        until_the_end,
        and_something_unasked,
        something_unasked_later,
    ],
)
async def test_an_unusable_connection_is_replaced_without_an_error(act: Act) -> None:
    assert await ask_twice(act) == 2


async def test_a_connection_is_not_reused_after_it_was_idle_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_IDLE_S", 0.001)
    assert await ask_twice(answer) == 2


async def cut(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(raw.bodies[-1])[:-5])
    await writer.drain()
    writer.close()


async def cut_in_the_head(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
    await writer.drain()
    writer.close()


async def reset(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def two_lengths(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(raw.bodies[-1], extra="content-length: 3\r\n"))
    await writer.drain()


async def endless_head(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: " + b"y" * 10_000 + b"\r\n")
        await writer.drain()


@pytest.mark.parametrize("act", [cut, cut_in_the_head, reset, two_lengths, endless_head])
async def test_an_incomplete_answer_is_an_error_and_the_next_request_has_a_new_connection(act: Act) -> None:
    async def once(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        await (act if len(raw.bodies) == 1 else answer)(raw, writer)

    async with raw_server(once) as raw:
        provider = provider_at(raw.base_url, connections=1)
        with pytest.raises(TransportError):
            await provider.embed(["a"])
        await provider.embed(["a"])
        await provider.aclose()
        assert raw.connections == 2


async def test_no_more_connections_are_opened_than_the_limit() -> None:
    here, most = 0, 0

    async def slowly(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        nonlocal here, most
        here += 1
        most = max(most, here)
        await asyncio.sleep(0.01)
        here -= 1
        await answer(raw, writer)

    async with raw_server(slowly) as raw:
        provider = provider_at(raw.base_url, connections=2)
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(provider.embed([str(number)]))
        await provider.aclose()
        assert (raw.connections, most) == (2, 2)


@pytest.mark.parametrize("sent", [0, 10, 60, 90])
async def test_a_call_that_is_cancelled_during_an_answer_leaves_no_connection_and_frees_its_slot(sent: int) -> None:
    reading = asyncio.Event()

    async def stops(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        if len(raw.bodies) > 1:
            await answer(raw, writer)
            return
        whole = good_answer(raw.bodies[-1])
        writer.write(whole[: len(whole) * sent // 100])
        await writer.drain()
        reading.set()
        assert not await gone(writer)

    async with raw_server(stops) as raw:
        provider = provider_at(raw.base_url, connections=1)
        call = asyncio.create_task(provider.embed(["a"]))
        await reading.wait()
        await asyncio.sleep(0.02)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(5):
            await provider.embed(["b"])
        await provider.aclose()
        assert raw.connections == 2


async def gone(writer: asyncio.StreamWriter) -> bytes:
    reader: asyncio.StreamReader = writer.transport.get_protocol()._stream_reader  # type: ignore[attr-defined]
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def test_a_proxy_in_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with raw_server(answer) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        provider = provider_at("http://api.example/v1", allow_insecure_http=True)
        await provider.embed(["a"])
        await provider.aclose()
    assert proxy.heads[0].startswith(b"POST http://api.example/v1/embeddings HTTP/1.1\r\n")


# ---- the client alone, with bodies of many pieces ----

LONG = bytes(range(256)) * 4 * (PIECE_BYTES // 512)


async def answer_long(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(LONG) + LONG)
    await writer.drain()


@asynccontextmanager
async def long_answer(raw: RawServer, tls: ssl.SSLContext | None = None) -> AsyncIterator[httpx2.Response]:
    async with (
        httpx2.AsyncClient(transport=Transport(tls)) as client,
        client.stream("POST", raw.base_url, content=LONG) as response,
    ):
        yield response


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=SELF_SIGNED)


@pytest.mark.parametrize("tls", [False, True])
async def test_a_long_body_arrives_complete_in_both_directions(tls: bool) -> None:
    pieces: list[bytes] = []
    async with raw_server(answer_long, tls=tls) as raw, long_answer(raw, trusting() if tls else None) as response:
        await read(response, len(LONG), lambda piece: pieces.append(bytes(piece)))
    assert b"".join(pieces) == LONG
    assert max(map(len, pieces)) <= PIECE_BYTES
    assert raw.bodies == [LONG]


async def test_httpx2_reads_the_same_long_body() -> None:
    async with raw_server(answer_long) as raw, long_answer(raw) as response:
        assert await response.aread() == LONG


async def test_a_long_chunk_is_passed_on_in_small_pieces() -> None:
    pieces: list[bytes] = []
    await read(httpx2.Response(200, content=LONG), len(LONG), lambda piece: pieces.append(bytes(piece)))
    assert b"".join(pieces) == LONG
    assert max(map(len, pieces)) <= PIECE_BYTES


@pytest.mark.parametrize("over", [0, 1])
async def test_no_more_bytes_are_passed_on_than_the_limit(over: int) -> None:
    size = 0

    def count(piece: memoryview) -> None:
        nonlocal size
        size += len(piece)

    limit = len(LONG) // 2 if over else len(LONG)
    async with raw_server(answer_long) as raw, long_answer(raw) as response:
        if over:
            with pytest.raises(ProtocolError, match=f"at most {limit:,} bytes"):
                await read(response, limit, count)
        else:
            await read(response, limit, count)
    assert size <= limit


async def test_a_reader_that_raises_ends_the_reading() -> None:
    def full(piece: memoryview) -> None:
        raise ValueError("full")

    async with raw_server(answer_long) as raw:
        with pytest.raises(ValueError, match="full"):
            async with long_answer(raw) as response:
                await read(response, len(LONG), full)


@pytest.mark.parametrize("runner", ["asyncio", "uvloop"])
def test_it_works_on_either_loop(runner: str) -> None:
    run: Callable[[Coroutine[Any, Any, int]], int] = asyncio.run
    if runner == "uvloop":
        run = pytest.importorskip("uvloop").run
    for act, connections in ((answer, 1), (chunked, 1), (closed_in_silence, 2), (something_unasked_later, 2)):
        assert run(ask_twice(act)) == connections


@pytest.mark.parametrize("length", [8_000, 40_000])
async def test_an_answer_with_a_long_header_is_read(length: int) -> None:
    async def act(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(good_answer(raw.bodies[-1], extra=f"x-policy: {'y' * length}\r\n"))
        await writer.drain()

    assert await ask_twice(act) == 1


async def test_a_server_that_does_not_answer_in_tls_is_given_up_after_the_time_to_connect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("asyncembed.providers.openai._CONNECT_S", 0.2)
    ended = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        ended.set()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        provider = provider_at(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        async with asyncio.timeout(10):
            with pytest.raises(TransportError, match="ConnectTimeout"):
                await provider.embed(["a"])
            await provider.aclose()
            await ended.wait()


@pytest.mark.parametrize("ends", [True, False])
async def test_a_refusal_with_an_incomplete_body_is_classified_by_its_status(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncembed.providers.http._ERROR_S", 0.05)

    async def act(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 429 Slow\r\nretry-after: 7\r\ncontent-length: 500\r\n\r\n{"error"')
        await writer.drain()
        if not ends:
            await asyncio.sleep(60)

    async with raw_server(act) as raw:
        provider = provider_at(raw.base_url)
        with pytest.raises(RateLimitedError) as caught:
            await provider.embed(["a"])
        assert caught.value.retry_after_s == 7
        await provider.aclose()


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_an_answer_without_a_body_ends_each_time(status: bytes) -> None:
    async def act(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %b\r\n\r\n" % status)
        await writer.drain()

    async with raw_server(act) as raw, httpx2.AsyncClient(transport=Transport(None)) as client:
        for _ in range(2):
            async with client.stream("POST", raw.base_url) as response:
                assert isinstance(response.stream, httpx2.AsyncByteStream)
                async for chunk in response.stream:
                    assert chunk  # an endless series of empty ones would block the loop


@pytest.mark.parametrize(
    ("surplus", "connections"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", 2),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", 2),
        (b"{}", 2),
        (b"HTTP/1.1 200 OK\r\ncontent-le", None),  # may be dropped unseen: the next answer has its own parser
    ],
)
@pytest.mark.parametrize("is_chunked", [True, False])
async def test_surplus_bytes_after_an_answer_never_reach_the_next_one(
    surplus: bytes, connections: int | None, is_chunked: bool
) -> None:
    async def act(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        head, body = head_and_body(good_answer(raw.bodies[-1]))
        if is_chunked:
            head, body = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        writer.write(head + b"\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(body + surplus)
        await writer.drain()

    assert await ask_twice(act) == connections or connections is None


async def test_the_rest_of_a_surplus_answer_that_comes_too_late_is_an_error() -> None:
    late = b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n"

    async def act(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        if len(raw.bodies) == 1:
            writer.write(good_answer(raw.bodies[-1]) + late[:20])
        elif len(raw.bodies) == 2:
            writer.write(late[20:])
        else:
            writer.write(good_answer(raw.bodies[-1]))
        await writer.drain()

    async with raw_server(act) as raw:
        provider = provider_at(raw.base_url)
        await provider.embed(["a"])
        with pytest.raises(TransportError):
            await provider.embed(["b"])
        reply = await provider.embed(["c"])
        np.testing.assert_allclose(reply.vectors, plain("c"), rtol=1e-6)
        await provider.aclose()
        assert raw.connections == 2


@pytest.mark.parametrize("is_in_the_body", [True, False])
async def test_closing_the_provider_ends_a_request_that_waits_for_its_answer(is_in_the_body: bool) -> None:
    reading = asyncio.Event()

    async def stops(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(good_answer(raw.bodies[-1])[: -5 if is_in_the_body else 10])
        await writer.drain()
        reading.set()
        assert not await gone(writer)

    async with raw_server(stops) as raw:
        provider = provider_at(raw.base_url)
        call = asyncio.create_task(provider.embed(["a"]))
        await reading.wait()
        await asyncio.sleep(0.02)
        async with asyncio.timeout(5):
            await provider.aclose()
            with pytest.raises(TransportError):
                await call


@pytest.mark.parametrize("tls", [False, True])
async def test_a_call_that_is_cancelled_while_its_request_is_sent_leaves_no_connection(
    tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(SELF_SIGNED))
    stopped = asyncio.Event()
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        stopped.set()
        await asyncio.sleep(0.05)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        with suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        ended.set()
        writer.transport.abort()

    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(SELF_SIGNED)
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        provider = provider_at(f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1")
        call = asyncio.create_task(provider.embed(["many words " * 3_000_000]))
        await stopped.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(5):
            await provider.aclose()
            await ended.wait()


@pytest.mark.parametrize("runner", ["asyncio", "uvloop"])
def test_closing_ends_even_if_a_call_was_cancelled_when_its_connection_was_made(
    runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = aiohttp.client_proto.ResponseHandler.connection_made

    async def main() -> None:
        closed = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await gone(writer)
            closed.set()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            provider = provider_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
            task = asyncio.create_task(provider.embed(["a"]))

            def leaving(self: Any, transport: asyncio.BaseTransport) -> None:
                made(self, transport)
                task.cancel()

            monkeypatch.setattr(aiohttp.client_proto.ResponseHandler, "connection_made", leaving)
            await asyncio.wait([task])
            assert task.cancelled()
            async with asyncio.timeout(10):
                await provider.aclose()
                await closed.wait()

    run = pytest.importorskip("uvloop").run if runner == "uvloop" else asyncio.run
    run(main())
