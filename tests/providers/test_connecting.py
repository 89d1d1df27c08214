"""One host with several addresses: the first that answers is used, and nothing else is left open."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from asyncembed.errors import TransportError
from asyncembed.providers.openai import OpenAIProvider

from .helpers import plain, provider_at
from .raw_server import RawServer, good_answer, raw_server


async def answer(raw: RawServer, writer: asyncio.StreamWriter) -> None:
    writer.write(good_answer(raw.bodies[-1]))
    await writer.drain()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with raw_server(answer) as raw:
        yield raw.port


@pytest.fixture
async def provider() -> AsyncIterator[OpenAIProvider]:
    provider = provider_at("http://many.example/v1", allow_insecure_http=True)
    yield provider
    await provider.aclose()


def ipv4(port: int, host: str = "127.0.0.1") -> Any:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))


def ipv6(port: int) -> Any:
    return (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def with_addresses(monkeypatch: pytest.MonkeyPatch, addresses: list[Any], silent_port: int = -1) -> list[int]:
    """Give every host these addresses, one of which may be silent; return the ports in the order they are tried."""
    loop = asyncio.get_running_loop()
    connect = loop.sock_connect
    tried: list[int] = []

    async def look_up(*args: Any, **options: Any) -> list[Any]:
        return addresses

    async def attempt(sock: socket.socket, address: Any) -> None:
        tried.append(address[1])
        if address[1] == silent_port:
            await asyncio.Event().wait()
        await connect(sock, address)

    monkeypatch.setattr(loop, "getaddrinfo", look_up)
    monkeypatch.setattr(loop, "sock_connect", attempt)
    return tried


async def assert_works(provider: OpenAIProvider) -> None:
    reply = await provider.embed(["a"])
    np.testing.assert_allclose(reply.vectors, plain("a"), rtol=1e-6)


async def test_the_next_address_is_tried_after_a_refusal(
    port: int, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = closed_port()
    tried = with_addresses(monkeypatch, [ipv4(refusing), ipv4(port)])
    await assert_works(provider)
    assert tried == [refusing, port]


async def test_the_next_address_is_tried_soon_after_a_silence(
    port: int, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = with_addresses(monkeypatch, [ipv4(9), ipv4(port)], silent_port=9)
    async with asyncio.timeout(3):
        await assert_works(provider)
    assert tried == [9, port]
    assert not [task for task in asyncio.all_tasks() if "connect" in repr(task.get_coro())]


async def test_connecting_to_any_number_of_addresses_ends_after_one_timeout(
    provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncembed.providers.openai._CONNECT_S", 0.3)
    before = asyncio.all_tasks()
    tried = with_addresses(monkeypatch, [ipv4(9, f"127.0.0.{number}") for number in range(1, 40)], silent_port=9)
    async with asyncio.timeout(10):
        with pytest.raises(TransportError, match="ConnectTimeout") as caught:
            await provider.embed(["a"])
    assert not caught.value.connected
    assert len(tried) < 10
    assert asyncio.all_tasks() == before


async def test_no_address_that_answers_is_an_error(provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = with_addresses(monkeypatch, [ipv4(closed_port()), ipv4(closed_port())])
    with pytest.raises(TransportError, match="ConnectError") as caught:
        await provider.embed(["a"])
    assert not caught.value.connected
    assert len(set(tried)) == 2


@pytest.mark.parametrize("host", [f"{'a' * 70}.test", "1.2.3.4.5"])
async def test_a_host_name_that_cannot_be_one_says_nothing_about_the_texts(host: str) -> None:
    provider = provider_at(f"https://{host}/v1")
    with pytest.raises(TransportError, match="ConnectError") as caught:
        await provider.embed(["a"])
    assert not caught.value.connected
    await provider.aclose()


async def test_a_caller_that_is_cancelled_leaves_neither_task_nor_socket(
    provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asyncio.all_tasks()
    connecting = asyncio.Event()

    async def connect(sock: socket.socket, address: Any) -> None:
        connecting.set()
        await asyncio.Event().wait()

    with_addresses(monkeypatch, [ipv4(9)])
    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", connect)
    call = asyncio.create_task(provider.embed(["a"]))
    await connecting.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert asyncio.all_tasks() == before  # an open socket would fail the test by its warning


async def test_a_caller_that_is_cancelled_during_a_look_up_leaves_no_task(
    provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asyncio.all_tasks()
    looking = asyncio.Event()

    async def look_up(*args: Any, **options: Any) -> list[Any]:
        looking.set()
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    call = asyncio.create_task(provider.embed(["a"]))
    await looking.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert asyncio.all_tasks() == before


async def test_a_family_that_this_machine_does_not_speak_is_skipped(
    port: int, provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = socket.socket

    def without_ipv6(family: int = -1, *args: Any, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return create(family, *args, **options)

    with_addresses(monkeypatch, [ipv6(port), ipv4(port)])
    monkeypatch.setattr(socket, "socket", without_ipv6)
    await assert_works(provider)


async def test_the_families_take_turns(provider: OpenAIProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = with_addresses(monkeypatch, [ipv6(61), ipv6(62), ipv4(41), ipv4(42)])

    async def refuse(sock: socket.socket, address: Any) -> None:
        tried.append(address[1])
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", refuse)
    with pytest.raises(TransportError):
        await provider.embed(["a"])
    assert list(dict.fromkeys(tried)) == [61, 41, 62, 42]
