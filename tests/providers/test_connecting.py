"""To one host at several addresses: the first that answers is taken, and nothing else is left."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from asyncembed.providers import connecting
from asyncembed.providers.connecting import connected

from .raw_server import RawServer, raw_server


async def silent(raw: RawServer, writer: asyncio.StreamWriter) -> None: ...


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with raw_server(silent) as raw:
        yield raw.port


def ipv4(port: int, host: str = "127.0.0.1") -> Any:
    return (socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port))


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def with_addresses(monkeypatch: pytest.MonkeyPatch, addresses: list[Any], silent_port: int = -1) -> list[int]:
    """Let every host have these, of which one may be silent; return the ports, as they are tried."""
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


async def test_one_address_is_connected_to(port: int) -> None:
    with await connected("127.0.0.1", port) as sock:
        assert sock.getpeername() == ("127.0.0.1", port)
        assert not sock.getblocking()


async def test_the_next_address_is_tried_at_once_after_a_refusal(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "NEXT_ADDRESS_S", 60.0)
    refusing = closed_port()
    tried = with_addresses(monkeypatch, [ipv4(refusing), ipv4(port)])
    with await connected("host", 1) as sock:
        assert sock.getpeername()[1] == port
    assert tried == [refusing, port]


async def test_the_next_address_is_tried_soon_after_a_silence(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "NEXT_ADDRESS_S", 0.001)
    with_addresses(monkeypatch, [ipv4(9), ipv4(port)], silent_port=9)
    with await connected("host", 1) as sock:
        assert sock.getpeername()[1] == port
    assert not [task for task in asyncio.all_tasks() if "_attempt" in repr(task)]


async def test_no_address_that_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_addresses(monkeypatch, [ipv4(closed_port()), ipv4(closed_port())])
    with pytest.raises(ConnectionRefusedError):
        await connected("host", 1)


async def test_who_is_cancelled_leaves_neither_task_nor_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    before = asyncio.all_tasks()
    with_addresses(monkeypatch, [ipv4(9)], silent_port=9)
    call = asyncio.create_task(connected("host", 1))
    await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert asyncio.all_tasks() == before  # and an open socket would fail the test by its warning


async def test_a_family_that_this_machine_does_not_speak_is_passed_over(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_addresses(monkeypatch, [(-1, socket.SOCK_STREAM, 0, "", ("host", 1)), ipv4(port)])
    with await connected("host", 1) as sock:
        assert sock.getpeername()[1] == port


async def test_the_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "NEXT_ADDRESS_S", 0.001)
    six = [(socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("::1", number, 0, 0)) for number in (61, 62)]
    tried = with_addresses(monkeypatch, [*six, ipv4(41), ipv4(42)])

    async def refuse(sock: socket.socket, address: Any) -> None:
        tried.append(address[1])
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", refuse)
    with pytest.raises(ConnectionRefusedError):
        await connected("host", 1)
    assert tried == [61, 41, 62, 42]
