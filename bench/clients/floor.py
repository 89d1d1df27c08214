"""The floor: the same requests and answers through the event loop's sockets, without parsing or decoding."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from bench.clients.chunks import in_chunks
from bench.job import Embed, Job


class Wire:
    """One keep-alive connection."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._socket: socket.socket | None = None

    async def post(self, body: bytes) -> bytearray:
        """Send one request and return the body of its answer."""
        loop = asyncio.get_running_loop()
        if self._socket is None:
            self._socket = socket.socket()
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(self._socket, self._address)
        await loop.sock_sendall(self._socket, b"POST /v1/embeddings HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body))
        await loop.sock_sendall(self._socket, body)
        first = await loop.sock_recv(self._socket, 65_536)
        head, _, begun = first.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {head[:64]!r}")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        answer = bytearray(length)
        answer[: len(begun)] = begun
        with memoryview(answer) as view:
            read = len(begun)
            while read < length:
                got = await loop.sock_recv_into(self._socket, view[read:])
                if not got:
                    raise RuntimeError("the server closed the connection")
                read += got
        return answer

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def body_of(texts: Sequence[str], model: str) -> bytes:
    """Return a request's body. It escapes nothing, as no text of the corpus needs that."""
    return b'{"input":["%b"],"model":"%b","encoding_format":"base64"}' % ('","'.join(texts).encode(), model.encode())


@asynccontextmanager
async def floor(job: Job) -> AsyncIterator[Embed]:
    address = urlsplit(job.base_url)
    assert address.hostname is not None
    assert address.port is not None
    wires = [Wire(address.hostname, address.port) for _ in range(job.concurrency)]
    free = list(wires)

    async def post(texts: Sequence[str]) -> list[bytearray]:
        wire = free.pop()
        try:
            # a row for each text, so that the rows can be counted as for other clients
            return [await wire.post(body_of(texts, job.model))] * len(texts)
        finally:
            free.append(wire)

    yield lambda texts: in_chunks(texts, job, post)
    for wire in wires:
        wire.close()
