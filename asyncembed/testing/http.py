"""HTTP/1.1 over asyncio's streams: as much as clients of the API need, and the ways in which faults break it."""

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

# The limit for a request's head. h11 and nginx stop at 16 and 32 KiB, so no client sends more.
MAX_HEAD_BYTES = 64 * 1024
# Bytes per write. The transport copies what the socket does not take at once, so a large body is written in slices.
_SLICE_BYTES = 256 * 1024


class BadHTTPError(Exception):
    """Not a valid HTTP/1.1 request. `status` is answered, then the connection is closed."""

    def __init__(self, status: int) -> None:
        super().__init__(HTTPStatus(status).phrase)
        self.status = status


class ClientLeftError(Exception):
    """The client closed the connection while it was being answered."""


@dataclass(frozen=True, slots=True)
class HTTPRequest:
    """One request. Names of headers are in lower case; the last value of a repeated header counts."""

    method: str
    target: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


class Wire:
    """One connection: reads requests, and sends answers in the ways that faults need.

    Args:
        reader: Bytes from the client.
        writer: Bytes to the client.
        max_body_bytes: A longer body is refused with 413; None for no limit.
    """

    def __init__(self, reader: StreamReader, writer: StreamWriter, max_body_bytes: int | None = None) -> None:
        self._reader = reader
        self._writer = writer
        self._max_body_bytes = max_body_bytes
        self.closing = False
        """Whether the connection ends after this answer."""
        self.on_answer: Callable[[int], None] | None = None
        """Called with the status before the last bytes are sent, so that the log has it when the client does."""

    async def read(self) -> HTTPRequest | None:
        """Return the next request; None if the client closed the connection between requests.

        Raises:
            BadHTTPError: The bytes are not a valid request.
            asyncio.IncompleteReadError: The client disconnected in the middle of a request.
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
        """Return status line and headers, up to the empty line; with `chunked`, the body's length is not announced."""
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
        """Send a complete, correct answer."""
        head, body = self.head(answer), memoryview(answer.body)
        last = max(0, len(body) - 1) // _SLICE_BYTES * _SLICE_BYTES
        for start in range(0, last, _SLICE_BYTES):
            await self.write(head + bytes(body[start : start + _SLICE_BYTES]))
            head = b""
        await self.write_last(head + bytes(body[last:]), answer.status)

    async def write(self, data: bytes) -> None:
        """Send raw bytes, and wait until the client takes them."""
        self._writer.write(data)
        await self._writer.drain()

    async def write_last(self, data: bytes, status: int) -> None:
        """Send the raw bytes that complete an answer; the request counts as answered with this status."""
        if self.on_answer is not None:
            self.on_answer(status)
        await self.write(data)

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`, as a server does while it computes.

        Raises:
            ClientLeftError: The client disconnected meanwhile.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                # If the next request comes this early, this answer is the last one on the connection. A client that
                # pipelines sends the other requests again (RFC 9112, 9.3.2).
                await self.until_next_request()
                await asyncio.sleep(seconds)

    async def until_next_request(self) -> None:
        """Wait for the first byte of the next request. That byte is lost, so the connection must be closed afterwards.

        Raises:
            ClientLeftError: The client disconnected instead.
        """
        if not await self._reader.read(1):
            raise ClientLeftError
        self.closing = True

    async def until_client_leaves(self) -> None:
        """Wait until the client disconnects, then raise ClientLeftError."""
        while await self._reader.read(_SLICE_BYTES):
            pass
        raise ClientLeftError

    def close(self) -> None:
        """Close the connection after this answer; everything written is still delivered."""
        self.closing = True

    def reset(self) -> None:
        """Close the connection with a RST: the client gets "connection reset by peer"."""
        self.closing = True
        sock = self._writer.get_extra_info("socket")
        # lingering for zero seconds makes the socket send a RST (socket(7), SO_LINGER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.abort()

    def abort(self) -> None:
        """Close the socket now and drop unsent bytes."""
        self.closing = True
        transport = self._writer.transport
        # CPython 3.11 fails if a transport that has closed by itself is aborted
        if not transport.is_closing() or transport.get_write_buffer_size():
            transport.abort()

    async def aclose(self) -> None:
        """Send the remaining bytes, close the connection, and wait until it is closed."""
        self._writer.close()
        with suppress(OSError):  # the client has reset the connection
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
