"""A TCP connection to a host that may have many addresses."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from typing import Any

from ..loops import ended

# RFC 8305 recommends a quarter of a second before the next address is tried, too.
NEXT_ADDRESS_S = 0.25


async def connected(host: str, port: int) -> socket.socket:
    """Return a socket that is connected to the address which answers first ("happy eyeballs", RFC 8305).

    Not asyncio's own, which uvloop lacks, and which loses a socket when it is cancelled as the connection comes.

    Raises:
        OSError: Of the last address that was tried. Nothing is left open.
    """
    loop = asyncio.get_running_loop()
    waiting = _alternating(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    attempts: dict[asyncio.Task[None], socket.socket] = {}
    try:
        while True:
            if waiting:
                family, kind, protocol, _, address = waiting.pop(0)
                attempt = socket.socket(family, kind, protocol)
                attempt.setblocking(False)
                attempts[asyncio.create_task(loop.sock_connect(attempt, address))] = attempt
            delay_s = NEXT_ADDRESS_S if waiting else None
            done, _ = await asyncio.wait(attempts, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    return attempts.pop(task)
                attempts.pop(task).close()
                if not (attempts or waiting):
                    raise error
    finally:
        for attempt in attempts.values():
            attempt.close()
        if attempts:
            await ended(*attempts)


def _alternating(addresses: list[Any]) -> list[Any]:
    """Put the families' first addresses first, then their second ones, and so on."""
    seen: Counter[int] = Counter()
    ranks = []
    for address in addresses:
        ranks.append(seen[address[0]])
        seen[address[0]] += 1
    return [address for _, address in sorted(zip(ranks, addresses, strict=True), key=lambda pair: pair[0])]
