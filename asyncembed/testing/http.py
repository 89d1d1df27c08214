"""As much of HTTP/1.1 as a client of embeddings needs, over asyncio's streams; and all ways to break it."""

from __future__ import annotations

import asyncio
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus

from .replies import Answer

# What one request's head may have; h11 and nginx stop at 16 and 32 KiB, so nobody sends more.
MAX_HEAD_BYTES = 64 * 1024
# Handed to the transport at once: it copies what the socket does not take, so megabytes are handed over in slices.
_SLICE_BYTES = 256 * 1024


class BadHTTPError(Exception):
    """What came is no HTTP/1.1 request. `status` is what it gets before the connection is closed."""

    def __init__(self, status: int) -> None:
        super().__init__(HTTPStatus(status).phrase)
        self.status = status


class ClientLeftError(Exception):
    """The client closed the connection while it was being answered."""


@dataclass(frozen=True, slots=True)
class HTTPRequest:
    """One request. The headers' names are in lower case; of a repeated one the last value counts."""

    method: str
    target: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


class Wire:
    """One connection, as the server and its faults see it.

    Args:
        reader: What the client sends.
        writer: What it gets.
        max_body_bytes: What is longer is refused with 413; None for no limit.
    """

    def __init__(self, reader: StreamReader, writer: StreamWriter, max_body_bytes: int | None = None) -> None:
        self._reader = reader
        self._writer = writer
        self._max_body_bytes = max_body_bytes
        self.closing = False
        """Whether the connection ends after this answer."""
        self.on_answer: Callable[[int], None] | None = None
        """Called with the status before the last bytes of an answer leave, so that who has it finds it in the log."""

    async def read(self) -> HTTPRequest | None:
        """Return the next request, None if the client has closed between requests.

        Raises:
            BadHTTPError: It is none.
            asyncio.IncompleteReadError: The client left in the middle of it.
        """
        try:
            head = await self._read_until(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return None
            raise
        method, target, version, headers = _parse_head(head)
        self.closing = version == "HTTP/1.0" or "close" in headers.get("connection", "").lower()
        if headers.get("expect", "").lower() == "100-continue":
            await self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return HTTPRequest(method, target, headers, await self._read_body(headers))

    async def _read_body(self, headers: Mapping[str, str]) -> bytes:
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return await self._read_chunks()
        length = _number(headers.get("content-length", "0"), 10)
        self._check_size(length)
        return await self._reader.readexactly(length)

    async def _read_chunks(self) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while length := _number((await self._line()).partition(b";")[0].decode("latin-1").strip(), 16):
            size += length
            self._check_size(size)
            chunks.append(await self._reader.readexactly(length))
            await self._line()
        while await self._line():  # trailers
            pass
        return b"".join(chunks)

    async def _line(self) -> bytes:
        return await self._read_until(b"\r\n")

    async def _read_until(self, end: bytes) -> bytes:
        try:
            return (await self._reader.readuntil(end))[: -len(end)]
        except asyncio.LimitOverrunError:
            raise BadHTTPError(431) from None

    def _check_size(self, size_bytes: int) -> None:
        if self._max_body_bytes is not None and size_bytes > self._max_body_bytes:
            raise BadHTTPError(413)

    def head(self, answer: Answer, *, chunked: bool = False) -> bytes:
        """Return status line and headers, ending with the empty line; `chunked` in place of the body's length."""
        headers = dict(answer.headers)
        if chunked:
            headers["transfer-encoding"] = "chunked"
        elif answer.status != 204:
            headers["content-length"] = str(len(answer.body))
        if self.closing:
            headers["connection"] = "close"
        lines = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    async def send(self, answer: Answer) -> None:
        """Send a whole, correct answer."""
        head, body = self.head(answer), memoryview(answer.body)
        last = max(0, len(body) - 1) // _SLICE_BYTES * _SLICE_BYTES
        for start in range(0, last, _SLICE_BYTES):
            await self.write(head + bytes(body[start : start + _SLICE_BYTES]))
            head = b""
        await self.write_last(head + bytes(body[last:]), answer.status)

    async def write(self, data: bytes) -> None:
        """Send raw bytes; wait while the client does not take them."""
        self._writer.write(data)
        await self._writer.drain()

    async def write_last(self, data: bytes, status: int) -> None:
        """Send the raw bytes that complete an answer of this status: it counts as answered."""
        if self.on_answer is not None:
            self.on_answer(status)
        await self.write(data)

    async def sleep(self, seconds: float) -> None:
        """Wait as a server does that is at work, unless the client leaves.

        Raises:
            ClientLeftError: It left.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                # If it comes this early, this answer is the last one here; a client that pipelines sends the
                # others again (RFC 9112, 9.3.2).
                await self.until_next_request()
                await asyncio.sleep(seconds)

    async def until_next_request(self) -> None:
        """Wait until the client begins its next request, whose first byte is lost. The connection is of no use then.

        Raises:
            ClientLeftError: It left.
        """
        if not await self._reader.read(1):
            raise ClientLeftError
        self.closing = True

    async def until_client_leaves(self) -> None:
        """Wait for as long as it takes, then raise ClientLeftError."""
        while await self._reader.read(_SLICE_BYTES):
            pass
        raise ClientLeftError

    def close(self) -> None:
        """End the connection after what was written: the client reads it, and then the end."""
        self.closing = True

    def reset(self) -> None:
        """End the connection with a RST: the client gets "connection reset by peer"."""
        self.closing = True
        sock = self._writer.get_extra_info("socket")
        # lingering for zero seconds is how a socket is told to reset (socket(7), SO_LINGER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        """Close the socket now; what was not sent yet is dropped."""
        self.closing = True
        transport = self._writer.transport
        # one that has closed by itself is left alone: CPython 3.11 fails when it is aborted then
        if not transport.is_closing() or transport.get_write_buffer_size():
            transport.abort()

    async def aclose(self) -> None:
        """Send what is left, close, and wait for that."""
        self._writer.close()
        with suppress(OSError):  # the client was faster, and ruder
            await self._writer.wait_closed()


def _parse_head(head: bytes) -> tuple[str, str, str, dict[str, str]]:
    first, *rest = head.decode("latin-1").split("\r\n")
    try:
        method, target, version = first.split(" ")
    except ValueError:
        raise BadHTTPError(400) from None
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise BadHTTPError(505 if version.startswith("HTTP/") else 400)
    headers: dict[str, str] = {}
    for line in rest:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise BadHTTPError(400)
        headers[name.lower()] = value.strip()
    return method, target, version, headers


def _number(text: str, base: int) -> int:
    try:
        number = int(text, base)
    except ValueError:
        raise BadHTTPError(400) from None
    if number < 0:
        raise BadHTTPError(400)
    return number


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:  # 520 to 529, 599
        return "Unknown"
