"""A TCP connection to a host that may have many addresses."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from typing import Any

from ..concurrency import ended

# RFC 8305 recommends a quarter of a second before the next address is tried, too.
NEXT_ADDRESS_S = 0.25


async def connected(host: str, port: int) -> socket.socket:
    """Return a socket that is connected to the address which answers first ("happy eyeballs", RFC 8305).

    Not asyncio's own, which uvloop lacks, and which loses a socket when it is cancelled as the connection comes.

    Raises:
        OSError: Of the last address that was tried. Nothing is left open.
    """
    addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    attempts: list[asyncio.Task[socket.socket]] = []
    winner: asyncio.Task[socket.socket] | None = None
    try:
        winner = await _first(_alternating(addresses), attempts)
    finally:
        losers = [attempt for attempt in attempts if attempt is not winner]
        try:
            await ended(*losers)
        except asyncio.CancelledError:
            losers = attempts
            raise
        finally:
            for attempt in losers:
                if not attempt.cancelled() and attempt.exception() is None:
                    attempt.result().close()
    return winner.result()


async def _first(addresses: list[Any], attempts: list[asyncio.Task[socket.socket]]) -> asyncio.Task[socket.socket]:
    """Try one address after the other, the next one when those before are late or have failed."""
    waiting = list(addresses)
    pending: set[asyncio.Task[socket.socket]] = set()
    while True:
        if waiting:
            attempts.append(asyncio.create_task(_attempt(waiting.pop(0))))
            pending.add(attempts[-1])
        delay_s = NEXT_ADDRESS_S if waiting else None
        done, pending = await asyncio.wait(pending, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
        for attempt in done:
            error = attempt.exception()
            if error is None:
                return attempt
            if not (pending or waiting):
                raise error


async def _attempt(address: Any) -> socket.socket:
    family, kind, protocol, _, name = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, name)
    except BaseException:
        sock.close()
        raise
    return sock


def _alternating(addresses: list[Any]) -> list[Any]:
    """Put the families' first addresses first, then their second ones, and so on."""
    seen: Counter[int] = Counter()
    ranks = []
    for address in addresses:
        ranks.append(seen[address[0]])
        seen[address[0]] += 1
    return [address for _, address in sorted(zip(ranks, addresses, strict=True), key=lambda pair: pair[0])]
