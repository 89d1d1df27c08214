"""Two servers between a client and PostgreSQL: a proxy that breaks connections, and a pooler."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

_SSL_REQUEST = 80_877_103  # PostgreSQL documentation, 54.7, "SSLRequest"


class Proxy:
    """Passes bytes between its own port and the server's socket; can break, hold or drop them.

    Attributes:
        connections: How many were accepted.
        let_through: While it is not set, no byte passes but all stays connected: a black hole.
        lose_commits: How many more answers to COMMIT are lost, together with their connections.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._writers: set[asyncio.StreamWriter] = set()
        self.connections = 0
        self.let_through = asyncio.Event()
        self.let_through.set()
        self.lose_commits = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._server.close()
        self.let_through.set()
        self.cut()
        await self._server.wait_closed()
        while self._writers:  # noqa: ASYNC110  # the handlers end a few steps later
            await asyncio.sleep(0)

    def cut(self) -> None:
        """Break all connections."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.connections += 1
        server, to_server = await asyncio.open_unix_connection(self._socket)
        self._writers |= {to_client, to_server}
        committing = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_requests(client, to_server, committing))
                group.create_task(self._pass_answers(server, to_client, committing))
        except* (OSError, EOFError):
            pass
        finally:
            for writer in (to_client, to_server):
                writer.transport.abort()
            self._writers -= {to_client, to_server}

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, committing: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 16):
            await self.let_through.wait()
            if self.lose_commits and b"COMMIT\0" in data:
                committing.set()
            writer.write(data)
            await writer.drain()
        raise EOFError

    async def _pass_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, committing: asyncio.Event
    ) -> None:
        while data := await reader.read(1 << 16):
            await self.let_through.wait()
            if committing.is_set():  # this is the server's answer to COMMIT
                self.lose_commits -= 1
                raise EOFError
            writer.write(data)
            await writer.drain()
        raise EOFError


class Pooler:
    """Gives every transaction another backend, as PgBouncer in transaction mode may do at any time.

    Attributes:
        backends: How many were opened.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self.backends = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        backend: _Backend | None = None
        try:
            startup = await _startup(client, to_client)
            backend = await self._open(startup, to_client, greets=True)
            while True:
                kind, message = await _message(client)
                if kind == b"X":  # Terminate
                    break
                if backend.is_idle:
                    await backend.aclose()
                    backend = await self._open(startup, to_client, greets=False)
                backend.send(kind, message)
        except (OSError, EOFError):
            pass
        finally:
            to_client.transport.abort()
            if backend is not None:
                await backend.aclose()

    async def _open(self, startup: bytes, client: asyncio.StreamWriter, *, greets: bool) -> _Backend:
        self.backends += 1
        reader, writer = await asyncio.open_unix_connection(self._socket)
        writer.write(startup)
        kind = b""
        while kind != b"Z":
            kind, message = await _message(reader)
            if greets:
                client.write(message)
        return _Backend(reader, writer, client)


class _Backend:
    """One connection to the server; its answers are sent to the client until it is closed."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        self._reader, self._writer, self._client = reader, writer, client
        self._owed = 0  # how many ReadyForQuery messages are still to come
        self._state = b"I"
        self._answering = asyncio.create_task(self._answer())

    @property
    def is_idle(self) -> bool:
        return self._owed == 0 and self._state == b"I"

    def send(self, kind: bytes, message: bytes) -> None:
        if kind in (b"Q", b"S"):  # Query, Sync
            self._owed += 1
        self._state = b"T"
        self._writer.write(message)

    async def _answer(self) -> None:
        while True:
            kind, message = await _message(self._reader)
            if kind == b"Z":  # ReadyForQuery: idle, in a transaction, in a failed one
                self._owed -= 1
                self._state = message[-1:]
            self._client.write(message)

    async def aclose(self) -> None:
        self._answering.cancel()
        await asyncio.wait([self._answering])
        self._writer.transport.abort()


async def _startup(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> bytes:
    while True:
        (length,) = struct.unpack("!I", head := await client.readexactly(4))
        body = await client.readexactly(length - 4)
        if struct.unpack("!I", body[:4])[0] != _SSL_REQUEST:
            return head + body
        to_client.write(b"N")


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readexactly(5)
    return head[:1], head + await reader.readexactly(struct.unpack("!I", head[1:])[0] - 4)
