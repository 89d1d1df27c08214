"""The provider through the real SDK against real servers on the loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx2
import numpy as np
import openai
import pytest

from asyncembed.errors import (
    AuthenticationError,
    BadRequestError,
    CertificateError,
    ConfigError,
    ProtocolError,
    ProviderError,
    RedirectRefusedError,
    RequestError,
    ServerError,
    TransportError,
)
from asyncembed.providers.openai import OpenAIProvider
from asyncembed.providers.responses import is_other_model
from asyncembed.testing import (
    LM_STUDIO,
    OLD_VLLM,
    Beside,
    BrokenGzip,
    CutBody,
    Disconnect,
    Drip,
    EmbeddingServer,
    Fault,
    Flood,
    Garbage,
    GzipBomb,
    Hang,
    HugeHeader,
    Interim,
    NotHTTP,
    Redirect,
    Reset,
    Status,
    WrongDimensions,
    every,
)

from .helpers import MODEL, plain, provider_at
from .raw_server import DIMENSIONS, RawServer, good_answer, raw_server


@pytest.fixture
async def server() -> AsyncIterator[EmbeddingServer]:
    async with EmbeddingServer(dimensions=DIMENSIONS) as server:
        yield server


# ---- what is sent ----


async def answer_well(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(raw.bodies[-1]))
    await writer.drain()


async def test_one_call_is_one_request_with_model_texts_in_order_and_base64() -> None:
    async with raw_server(answer_well) as raw:
        reply = await provider_at(raw.base_url).embed(["b", "ä\n<|endoftext|>", "a"])
    assert [json.loads(body) for body in raw.bodies] == [
        {"model": MODEL, "input": ["b", "ä\n<|endoftext|>", "a"], "encoding_format": "base64"}
    ]
    head = raw.heads[0].lower()
    assert raw.heads[0].startswith(b"POST /v1/embeddings HTTP/1.1\r\n")
    assert b"authorization: bearer sk-test-0123456789\r\n" in head
    assert b"content-type: application/json\r\n" in head
    assert b"accept-encoding: identity\r\n" in head
    np.testing.assert_allclose(reply.vectors, plain("b", "ä\n<|endoftext|>", "a"))
    assert reply.tokens is None


async def test_dimensions_are_sent_only_if_requested() -> None:
    async with raw_server(answer_well) as raw:
        await provider_at(raw.base_url, dimensions=DIMENSIONS).embed(["a"])
    assert json.loads(raw.bodies[0])["dimensions"] == DIMENSIONS


async def test_a_large_request_is_the_same_as_a_small_one(server: EmbeddingServer) -> None:
    texts = [f"{index} " + "word " * 100 for index in range(300)]
    reply = await provider_at(server.base_url).embed(texts)
    np.testing.assert_array_equal(reply.vectors, plain(*texts))
    assert reply.tokens == server.requests[0].tokens


@pytest.mark.parametrize("status", [429, 500, 503, 408, 409])
async def test_the_sdk_retries_nothing(server: EmbeddingServer, status: int) -> None:
    server.faults = lambda _: Status(status, {"x-should-retry": "true", "retry-after": "0.01"})
    with pytest.raises(ProviderError):
        await provider_at(server.base_url).embed(["a"])
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(server: EmbeddingServer, status: int) -> None:
    async with EmbeddingServer() as elsewhere:
        server.faults = lambda _: Redirect(f"{elsewhere.base_url}/embeddings", status)
        with pytest.raises(RedirectRefusedError):
            await provider_at(server.base_url).embed(["a"])
        assert len(server.requests) == 1
        assert elsewhere.connections == 0


async def test_a_client_that_follows_redirects_does_not_follow_them_for_the_provider(server: EmbeddingServer) -> None:
    async with EmbeddingServer() as elsewhere, httpx2.AsyncClient(follow_redirects=True) as http_client:
        server.faults = lambda _: Redirect(f"{elsewhere.base_url}/embeddings", 307)
        with pytest.raises(RedirectRefusedError):
            await provider_at(server.base_url, http_client=http_client).embed(["a"])
        assert elsewhere.connections == 0


async def test_the_rates_of_an_answer_are_on_the_reply_and_on_the_error() -> None:
    headers = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "7"}
    async with EmbeddingServer(requests_per_minute=60, faults=[None, Status(500, headers)]) as server:
        provider = provider_at(server.base_url)
        reply = await provider.embed(["a"])
        with pytest.raises(ServerError) as caught:
            await provider.embed(["a"])
    assert reply.rates is not None
    assert reply.rates.limit_requests == 60
    assert caught.value.rates.remaining_requests == 7


# ---- ready clients ----


@pytest.mark.parametrize("deployment", [None, "my deployment"])
async def test_azure_gets_its_path_and_its_api_version(deployment: str | None) -> None:
    async with raw_server(answer_well) as raw:
        client = openai.AsyncAzureOpenAI(
            azure_endpoint=f"http://127.0.0.1:{raw.port}",
            azure_deployment=deployment,
            api_version="2024-10-21",
            api_key="azure-key",
        )
        await OpenAIProvider("my deployment", client=client).embed(["a"])
        await client.close()
    head = raw.heads[0]
    assert head.startswith(b"POST /openai/deployments/my%20deployment/embeddings?api-version=2024-10-21 HTTP/1.1\r\n")
    assert b"api-key: azure-key\r\n" in head.lower()


async def test_a_client_that_was_passed_in_is_used_as_it_is_and_not_closed(server: EmbeddingServer) -> None:
    async with openai.AsyncOpenAI(
        base_url=server.base_url, api_key="sk-theirs", default_headers={"x-team": "search"}, max_retries=5
    ) as client:
        provider = OpenAIProvider(MODEL, client=client)
        await provider.embed(["a"])
        await provider.aclose()
        assert not client.is_closed()
        server.faults = lambda _: Status(500)
        with pytest.raises(ServerError):
            await provider.embed(["a"])
    assert [request.headers["x-team"] for request in server.requests] == ["search", "search"]
    assert server.requests[0].headers["authorization"] == "Bearer sk-theirs"


@pytest.mark.parametrize("kind", [httpx2.AsyncClient, httpx.AsyncClient])
async def test_an_http_client_that_was_passed_in_is_used_and_not_closed(server: EmbeddingServer, kind: Any) -> None:
    async with kind(headers={"x-team": "search"}) as http_client:
        provider = provider_at(server.base_url, http_client=http_client)
        reply = await provider.embed(["a"])
        await provider.aclose()
        assert not http_client.is_closed
        for fault, error in (
            (Status(401), AuthenticationError),
            (Reset(), TransportError),
            (CutBody(), TransportError),
        ):
            server.faults = lambda _, fault=fault: fault
            with pytest.raises(error):
                await provider.embed(["a"])
    np.testing.assert_array_equal(reply.vectors, plain("a"))
    assert server.requests[0].headers["x-team"] == "search"
    assert len(server.requests) == 4


async def test_eight_requests_share_a_client_of_two_connections(server: EmbeddingServer) -> None:
    async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=2)) as http_client:
        provider = provider_at(server.base_url, http_client=http_client)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(provider.embed([str(number)])) for number in range(8)]
    for number, task in enumerate(tasks):
        np.testing.assert_array_equal(task.result().vectors, plain(str(number)))
    assert server.connections <= 2


async def test_a_closed_client_that_was_passed_in_stops_the_run(server: EmbeddingServer) -> None:
    http_client = httpx2.AsyncClient()
    await http_client.aclose()
    with pytest.raises(RequestError, match="closed"):
        await provider_at(server.base_url, http_client=http_client).embed(["a"])


async def test_a_key_function_is_called_for_every_request(server: EmbeddingServer) -> None:
    keys = iter(["sk-first", "sk-second\n"])

    async def rotate() -> str:
        return next(keys)

    provider = provider_at(server.base_url, api_key=rotate)
    await provider.embed(["a"])
    await provider.embed(["a"])
    sent = [request.headers["authorization"] for request in server.requests]
    assert sent == ["Bearer sk-first", "Bearer sk-second"]


@pytest.mark.parametrize("given", [RuntimeError("vault"), "sk with blanks", 5, None])
async def test_a_key_function_that_gives_no_key_stops_the_run(server: EmbeddingServer, given: Any) -> None:
    async def rotate() -> Any:
        if isinstance(given, Exception):
            raise given
        return given

    with pytest.raises(AuthenticationError, match=r"api_key\(\)") as caught:
        await provider_at(server.base_url, api_key=rotate).embed(["a"])
    assert "blanks" not in str(caught.value)
    assert server.requests == []


# ---- what goes wrong on the wire ----

TRANSPORT_FAULTS = [
    pytest.param(Reset(), id="reset before the answer"),
    pytest.param(Reset("mid-body"), id="reset in the body"),
    pytest.param(Disconnect(), id="closed before the answer"),
    pytest.param(Disconnect("mid-body"), id="closed in the body"),
    pytest.param(CutBody(), id="less than content-length"),
    pytest.param(CutBody(chunked=True), id="the last chunk missing"),
    pytest.param(BrokenGzip(corrupt=True), id="corrupt gzip, although identity was requested"),
    pytest.param(BrokenGzip(), id="half a gzip"),
    pytest.param(NotHTTP(), id="no HTTP"),
    pytest.param(HugeHeader(), id="a megabyte of header"),
]


@pytest.mark.parametrize("fault", TRANSPORT_FAULTS)
async def test_a_broken_answer_is_an_error_after_one_request_and_the_next_one_works(
    server: EmbeddingServer, fault: Fault
) -> None:
    server.faults = lambda request: fault if request.number == 1 else None
    provider = provider_at(server.base_url)
    with pytest.raises((TransportError, ProtocolError)) as caught:
        await provider.embed(["a"])
    # an error of theirs holds the request, and with it key and texts
    assert not isinstance(caught.value.__context__, (openai.OpenAIError, httpx2.HTTPError))
    assert len(server.requests) == 1
    reply = await provider.embed(["a"])
    np.testing.assert_array_equal(reply.vectors, plain("a"))


@pytest.mark.parametrize("status", [100, 103])
async def test_an_interim_answer_is_skipped(server: EmbeddingServer, status: int) -> None:
    server.faults = lambda _: Interim(status)
    reply = await provider_at(server.base_url).embed(["a"])
    np.testing.assert_array_equal(reply.vectors, plain("a"))


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"<html>", b"[" * 100_000, b'{"data": [{', b"\xff\xfe"])
async def test_garbage_is_a_protocol_error(server: EmbeddingServer, body: bytes) -> None:
    server.faults = lambda _: Garbage(body)
    with pytest.raises(ProtocolError):
        await provider_at(server.base_url).embed(["a"])


async def test_a_refused_connection_names_its_reason() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError, match="refused"):
            await provider_at(f"http://127.0.0.1:{free.getsockname()[1]}/v1").embed(["a"])


async def test_an_unknown_host_name_is_a_transport_error() -> None:
    with pytest.raises(TransportError):
        await provider_at("https://unknown.invalid/v1").embed(["a"])


@pytest.mark.parametrize("fault", [Hang(), Hang("mid-body"), Drip(bytes_per_s=40)], ids=["hang", "half", "drip"])
async def test_the_timeout_is_wall_clock_even_while_bytes_arrive(server: EmbeddingServer, fault: Fault) -> None:
    server.faults = lambda _: fault
    loop = asyncio.get_running_loop()
    provider = provider_at(server.base_url, timeout=0.3)
    await provider._client()
    started = loop.time()
    with pytest.raises(TransportError):
        await provider.embed(["a"])
    assert loop.time() - started < 3  # the drip alone would take more than 10 s
    assert len(server.requests) == 1


async def test_connections_that_the_server_closes_after_its_answers_are_replaced(server: EmbeddingServer) -> None:
    server.faults = lambda _: Disconnect("after")
    provider = provider_at(server.base_url)
    good = 0
    for _ in range(20):
        try:
            reply = await provider.embed(["a"])
        except TransportError:
            continue
        np.testing.assert_array_equal(reply.vectors, plain("a"))
        good += 1
    assert good >= 10  # at worst every other one meets a connection that is closed


async def test_a_self_signed_certificate_is_refused_before_anything_is_sent() -> None:
    async with raw_server(answer_well, tls=True) as raw:
        with pytest.raises(CertificateError, match="self-signed"):
            await provider_at(raw.base_url).embed(["a"])
    assert raw.heads == []


async def test_https_to_a_server_without_tls_is_reported() -> None:
    async def answer_400(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer_400, "127.0.0.1", 0) as plaintext:
        port = plaintext.sockets[0].getsockname()[1]
        with pytest.raises(RequestError, match="TLS"):
            await provider_at(f"https://127.0.0.1:{port}/v1").embed(["a"])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Flood(), id="a flood"),
        pytest.param(GzipBomb(100_000_000), id="a bomb"),
    ],
)
@pytest.mark.parametrize("kind", [None, httpx2.AsyncClient])
async def test_a_reply_longer_than_a_valid_one_is_not_read_to_its_end(fault: Fault, kind: Any) -> None:
    with EmbeddingServer(faults=lambda _: fault).in_thread() as server:
        http_client = kind() if kind else None
        provider = provider_at(server.base_url, dimensions=DIMENSIONS, http_client=http_client)
        await provider._client()
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError, match="bytes"):
                await provider.embed(["a"])
            # the server runs in this process, too: it holds slices of a quarter megabyte
            assert tracemalloc.get_traced_memory()[1] < 20_000_000
        finally:
            tracemalloc.stop()
        if http_client:
            await http_client.aclose()


async def test_only_the_beginning_of_an_error_is_read() -> None:
    async def endless(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 Oops\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
            await writer.drain()

    async with raw_server(endless) as raw:
        with pytest.raises(ServerError) as caught:
            await provider_at(raw.base_url).embed(["a"])
    assert len(str(caught.value)) < 400


# ---- encodings and dimensions ----


async def test_a_server_that_refuses_base64_gets_requests_for_floats_from_then_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with EmbeddingServer(dialect=OLD_VLLM, dimensions=DIMENSIONS) as server:
        provider = provider_at(server.base_url)
        first = await provider.embed(["a"])
        await provider.embed(["b"])
    np.testing.assert_allclose(first.vectors, plain("a"), rtol=1e-6)
    assert [request.base64 for request in server.requests] == [True, False, False]
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == [
        "asyncembed.providers.openai"
    ]


async def test_eight_requests_at_once_detect_refused_base64_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    async with EmbeddingServer(dialect=OLD_VLLM, dimensions=DIMENSIONS) as server:
        provider = provider_at(server.base_url)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(provider.embed([str(number)])) for number in range(8)]
        await provider.embed(["last"])
    for number, task in enumerate(tasks):
        np.testing.assert_allclose(task.result().vectors, plain(str(number)), rtol=1e-6)
    assert not server.requests[-1].base64
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


async def test_a_proxy_that_refuses_the_option_itself_gets_requests_without_it() -> None:
    async def litellm(raw: RawServer, writer: asyncio.StreamWriter) -> None:
        body = json.loads(raw.bodies[-1])
        if "encoding_format" not in body:
            return await answer_well(raw, writer)
        asked = {"encoding_format": body["encoding_format"]}
        message = f"litellm.UnsupportedParamsError: Setting {asked} is not supported by DeepInfra."
        answer = json.dumps({"error": {"message": message, "code": "400"}}).encode()
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer))
        return await writer.drain()

    async with raw_server(litellm) as raw:
        provider = provider_at(raw.base_url)
        await provider.embed(["a"])
        await provider.embed(["b"])
    asked = [json.loads(body).get("encoding_format") for body in raw.bodies]
    assert asked == ["base64", "float", None, None]


async def test_an_error_that_only_mentions_base64_does_not_end_base64(server: EmbeddingServer) -> None:
    server.faults = lambda request: Status(400, message="cannot read base64") if "bad" in request.texts else None
    provider = provider_at(server.base_url)
    with pytest.raises(BadRequestError):
        await provider.embed(["bad"])
    await provider.embed(["good"])
    assert server.requests[-1].base64


async def test_the_first_reply_sets_the_dimensions_of_all_others(server: EmbeddingServer) -> None:
    provider = provider_at(server.base_url)
    assert provider.info.dimensions is None
    await provider.embed(["a"])
    assert provider.info.dimensions == DIMENSIONS
    server.faults = lambda _: WrongDimensions(DIMENSIONS + 1)
    with pytest.raises(ProtocolError, match=r"8 .*9"):
        await provider.embed(["a"])


async def test_dimensions_that_a_server_ignores_are_an_error_naming_both() -> None:
    async with EmbeddingServer(dialect=LM_STUDIO, dimensions=DIMENSIONS) as server:
        with pytest.raises(ProtocolError, match=r"4 .*8"):
            await provider_at(server.base_url, dimensions=4).embed(["a"])


async def test_another_model_in_the_replies_is_logged_once(
    server: EmbeddingServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = every(1, Beside(values={"model": "another-model"}))
    provider = provider_at(server.base_url)
    for _ in range(3):
        await provider.embed(["a"])
    await provider.aclose()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert MODEL in caplog.text


@pytest.mark.parametrize(
    ("requested", "reported", "other"),
    [
        ("text-embedding-3-small", "text-embedding-3-small", False),
        ("text-embedding-ada-002", "text-embedding-ada-002-v2", False),
        ("openai/text-embedding-3-small", "text-embedding-3-small", False),
        ("BAAI/bge-m3", "baai/BGE-M3", False),
        ("bge-m3", None, False),
        ("bge-m3", "", False),
        ("text-embedding-3-small", "text-embedding-3-large", True),
    ],
)
def test_a_model_may_be_spelled_in_other_ways(requested: str, reported: str | None, other: bool) -> None:
    assert is_other_model(requested, reported) is other


@pytest.mark.parametrize(
    ("client", "why"),
    [
        pytest.param("https://api.openai.com/v1", "client= is str", id="an address"),
        pytest.param(object(), "client= is object", id="anything"),
        pytest.param(openai.OpenAI(api_key="k"), "client= is OpenAI, which would block", id="a client that blocks"),
    ],
)
def test_an_object_that_is_no_async_client_is_refused_at_once(client: Any, why: str) -> None:
    with pytest.raises(TypeError, match=why):
        OpenAIProvider(MODEL, client=client)


@pytest.mark.parametrize("other", [{"base_url": "http://127.0.0.1:1/v1"}, {"api_key": "sk-other"}])
def test_a_client_cannot_be_combined_with_another_address_or_key(other: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"leave out {next(iter(other))}="):
        OpenAIProvider(MODEL, client=openai.AsyncOpenAI(api_key="k"), **other)
