"""A server that reads requests and lets a test do anything with the connection."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

from asyncembed.testing import embedding_of

Act: TypeAlias = Callable[["RawServer", asyncio.StreamWriter], Awaitable[None]]

DIMENSIONS = 8

# A certificate and its key. No system trusts it, which is its purpose.
SELF_SIGNED = Path(__file__).with_name("localhost.pem")


def good_answer(body: bytes, *, extra: str = "") -> bytes:
    """A whole, correct answer to a request's body, with more headers if a test wants them."""
    texts = json.loads(body)["input"]
    data = [
        {"index": index, "embedding": embedding_of(text, dimensions=DIMENSIONS).tolist()}
        for index, text in enumerate(texts)
    ]
    answer = json.dumps({"data": data}).encode()
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(answer)}\r\n{extra}\r\n".encode() + answer


class RawServer:
    """The requests that were received (`heads` and `bodies`), and the address of the server (`base_url`)."""

    def __init__(self, scheme: str) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.port = 0
        self._scheme = scheme

    @property
    def base_url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}/v1"


@asynccontextmanager
async def raw_server(act: Act, *, tls: bool = False) -> AsyncIterator[RawServer]:
    """Run one; `act` is called after each request, and the connection is closed when it returns."""
    raw = RawServer("https" if tls else "http")
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while not writer.is_closing():
                raw.heads.append(await reader.readuntil(b"\r\n\r\n"))
                length = re.search(rb"content-length: (\d+)", raw.heads[-1], re.IGNORECASE)
                raw.bodies.append(await reader.readexactly(int(length[1]) if length else 0))
                await act(raw, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has left, or the test is over
        finally:
            writer.transport.abort()

    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(SELF_SIGNED)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    raw.port = server.sockets[0].getsockname()[1]
    try:
        yield raw
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await server.wait_closed()
