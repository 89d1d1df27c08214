"""A minimal client that exposes every byte, for behaviour that HTTP libraries hide."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from asyncembed.testing import EmbeddingServer


@dataclass(frozen=True)
class RawReply:
    """One answer as received; names of `headers` in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def request_bytes(body: object, *headers: str, path: str = "/v1/embeddings", method: str = "POST") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {len(raw)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + raw


async def read_reply(reader: asyncio.StreamReader) -> RawReply:
    """Read one answer; raises IncompleteReadError if it is incomplete."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return RawReply(int(first.split(" ")[1]), headers, body)


async def exchange(server: EmbeddingServer, raw: bytes) -> RawReply:
    """Send the bytes on a new connection and read one answer."""
    reader, writer = await asyncio.open_connection(server.host, server.port, limit=2**24)
    try:
        writer.write(raw)
        await writer.drain()
        return await read_reply(reader)
    finally:
        writer.close()
        await writer.wait_closed()


async def ask(server: EmbeddingServer, texts: object, *headers: str, **options: object) -> RawReply:
    """Request the embeddings of the texts."""
    return await exchange(
        server, request_bytes({"model": "text-embedding-3-small", "input": texts, **options}, *headers)
    )


async def everything(server: EmbeddingServer, raw: bytes) -> bytes:
    """Send the bytes and return everything until the server closes; a reset raises ConnectionResetError."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(raw)
        return await reader.read()
    finally:
        writer.close()
