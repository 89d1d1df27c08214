"""The HTTP client that sends requests: httpx2, which the SDK uses, over aiohttp's connections.

Importing this module loads both, so `openai` imports it in a thread when it is first needed. No other module imports
them. httpx2's own connections read 64 kB at a time and copy each byte seven times: a bulk job takes 60 % more CPU.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.request import getproxies

import aiohttp
import httpx2
import pydantic_core

from ..errors import ProtocolError
from .decoding import PIECE_BYTES

# httpx2 closes a connection that was idle for this long (httpx2/_config.py, keepalive_expiry), because servers close
# theirs soon after.
_IDLE_S = 5.0
# The longest header line. aiohttp's default of 8,190 bytes is less than some proxies send; httpx2 takes a head of
# this size (httpcore2/_async/http11.py, MAX_INCOMPLETE_EVENT_SIZE).
_LONGEST_HEADER = 100 * 1024
# Only the beginning of an error's body is read: the longest known message has 300 bytes.
_ERROR_BYTES = 64 * 1024
_ERROR_S = 2.0  # seconds to wait for it: the status alone is enough to decide


def client_for(base_url: str, connections: int) -> httpx2.AsyncClient:
    """Return a client for one address. Blocks: reading the system's certificates takes 30 ms.

    httpx2's own connections are used behind a proxy that the environment names, because httpx2 has its own rules
    for which addresses that is.
    """
    proxied = any(getproxies().get(kind) for kind in ("http", "https", "all"))
    tls = None
    if base_url.startswith("https:") and not proxied:
        tls = httpx2.create_ssl_context()
        tls.set_alpn_protocols(["http/1.1"])
    return httpx2.AsyncClient(
        transport=None if proxied else Transport(tls),
        follow_redirects=False,
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        event_hooks={"response": [_stop_at_refusal]},
    )


def transport_errors() -> tuple[type[Exception], ...]:
    """Return the errors of httpx2, and of the old httpx if the user's client is one of its clients."""
    legacy = sys.modules.get("httpx")
    return tuple(error for module in (httpx2, legacy) if module for error in (module.RequestError, module.StreamError))


class RefusedError(Exception):
    """An answer that is an error, with the beginning of its body. The SDK would read the body to its end."""

    def __init__(self, response: Any, body: bytes) -> None:
        super().__init__(response.status_code)
        self.response = response
        self.body = body


async def _stop_at_refusal(response: httpx2.Response) -> None:
    if not response.is_success:
        body = bytearray()
        # status and headers are an answer, even if the body is cut or does not come
        with suppress(httpx2.RequestError, httpx2.StreamError, TimeoutError):
            async with asyncio.timeout(_ERROR_S):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _ERROR_BYTES:
                        break
        raise RefusedError(response, bytes(body[:_ERROR_BYTES]))


def to_json(fields: dict[str, Any]) -> bytes:
    """Return the body of a request. 2,048 texts of 550 characters hold the GIL for 0.5 ms; with `json`, 4.8 ms."""
    return pydantic_core.to_json(fields)


async def read(response: Any, limit: int, take: Callable[[memoryview], object]) -> None:
    """Read the body of a response, from any client, and pass it on in pieces.

    Raises:
        ProtocolError: It is longer than the limit; it was not read to its end.
    """
    size = 0
    async for chunk in response.aiter_bytes():
        size += len(chunk)
        if size > limit:
            raise ProtocolError(f"expected a reply of at most {limit:,} bytes, got more")
        for start in range(0, len(chunk), PIECE_BYTES):
            if start:
                await asyncio.sleep(0)
            take(memoryview(chunk)[start : start + PIECE_BYTES])


class Transport(httpx2.AsyncBaseTransport):
    """Sends httpx2's requests over aiohttp's connections. Belongs to the event loop of its first request.

    It opens a connection whenever none is idle: its caller limits how many requests run at once. Of httpx2's timeouts
    it uses only the one to connect: its caller has a deadline.
    """

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._reading: set[aiohttp.ClientResponse] = set()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # with aiohttp's DNS cache, a look-up would outlive the call that was cancelled
                connector=aiohttp.TCPConnector(
                    limit=0, ssl=self._tls or True, keepalive_timeout=_IDLE_S, use_dns_cache=False
                ),
                request_class=_Request,
                response_class=_Response,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
                auto_decompress=False,
                max_line_size=_LONGEST_HEADER,
                max_field_size=_LONGEST_HEADER,
            )
        return self._session

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        with _as_httpx2():
            response = await self._send(request)
        self._reading.add(response)
        body = _Body(response, self._reading)
        return httpx2.Response(response.status, headers=response.raw_headers, stream=body)

    async def _send(self, request: httpx2.Request) -> aiohttp.ClientResponse:
        connect_s = request.extensions.get("timeout", {}).get("connect")
        while True:
            try:
                return await self._open().request(
                    request.method,
                    str(request.url),
                    headers=request.headers.multi_items(),
                    data=request.stream,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None, connect=connect_s),
                )
            except _UnaskedError:
                continue  # with another connection: aiohttp has closed this one

    async def aclose(self) -> None:
        for response in list(self._reading):
            response.close()
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0)  # aborted connections close their sockets in the loop's next iteration


class _UnaskedError(Exception):
    """An idle connection has received something that was not requested. Nothing was sent on it."""


class _Request(aiohttp.ClientRequest):
    async def send(self, conn: Any) -> aiohttp.ClientResponse:
        # aiohttp only checks whether the connection is open, and would take those bytes for the answer
        if conn.protocol.should_close:
            raise _UnaskedError
        return await super().send(conn)


class _Response(aiohttp.ClientResponse):
    def close(self) -> None:
        """Drop the connection unless the answer was read to its end."""
        # aiohttp alone would first send the rest of the request, and wait for the server to end TLS
        if self.connection is not None and self.connection.transport is not None:
            self.connection.transport.abort()
        super().close()


class _Body(httpx2.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse, reading: set[aiohttp.ClientResponse]) -> None:
        self._response = response
        self._reading = reading

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx2():
            content = self._response.content
            # not iter_any, which joins chunks, nor iter_chunks, which never ends for aiohttp's shared empty body
            while not content.at_eof():
                yield (await content.readchunk())[0]

    async def aclose(self) -> None:
        self._reading.discard(self._response)
        self._response.close()


@contextmanager
def _as_httpx2() -> Iterator[None]:
    """Raise the errors that httpx2's own transport would raise, caused by the system's error if there is one."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx2.ConnectTimeout("no connection in time") from error
    except (aiohttp.ClientConnectorError, ValueError) as error:  # ValueError: an invalid host name
        raise httpx2.ConnectError("the connection failed") from (error.__cause__ or error)
    except (aiohttp.ClientError, OSError) as error:
        raise httpx2.ReadError("no whole answer") from (error.__cause__ or error)
