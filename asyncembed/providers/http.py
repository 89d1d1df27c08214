"""The HTTP client that carries requests: httpx2, over connections of our own where no proxy is in between.

Importing this loads httpx2, so `openai` does it in a thread when it is first needed. The only module that imports it.

What httpx2 brings reads 64 kB at a time and copies each byte seven times on its way. Here a reply goes from the socket
to the decoder, and what asyncio has for speed (a buffer of our own, TLS in the transport) is used. h11 writes and reads
the heads, and the bodies that are not plain bytes of a known length. Measured for 128 MB of replies: 40 ms of CPU in
place of 175, and 100 in place of 410 through TLS.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, cast
from urllib.request import getproxies

import h11
import httpx2
import pydantic_core

from ..errors import ProtocolError
from .connecting import connected
from .decoding import PIECE_BYTES

Take: TypeAlias = Callable[[memoryview], object]
"""Is given the bytes of a body as they come; a view that is valid only until it returns."""

Origin: TypeAlias = tuple[str, str, int]
"""Scheme, host and port."""

# httpx2's limit for a head (httpcore2/_async/http11.py, MAX_INCOMPLETE_EVENT_SIZE) and for connections not in use
# (httpx2/_config.py, keepalive_expiry): servers close theirs soon after.
_LONGEST_HEAD = 100 * 1024
_KEPT_S = 5.0
# Of an answer that is an error only the beginning is read: the longest message in faults.md has 300 bytes.
_ERROR_BYTES = 64 * 1024
# Seconds for it: what comes later is not waited for, since the status tells what to do.
_ERROR_S = 2.0
# Where a response of ours has what reads its body without copies.
_RECEIVE = "asyncembed.receive"


def client_for(base_url: str, connections: int) -> httpx2.AsyncClient:
    """Return a client for one address; blocking, since reading the system's certificates takes 30 ms.

    Behind a proxy of the environment's, and that is told by httpx2's own rules, its own connections are used.
    """
    proxied = any(getproxies().get(kind) for kind in ("http", "https", "all"))
    tls = None
    if base_url.startswith("https:") and not proxied:
        tls = httpx2.create_ssl_context()
        tls.set_alpn_protocols(["http/1.1"])
    return httpx2.AsyncClient(
        transport=None if proxied else Transport(connections, tls),
        follow_redirects=False,
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        event_hooks={"response": [_stop_at_refusal]},
    )


class RefusedError(Exception):
    """An answer that is an error, and the beginning of its body: the SDK would read it to whatever end it has."""

    def __init__(self, response: Any, body: bytes) -> None:
        super().__init__(response.status_code)
        self.response = response
        self.body = body


async def _stop_at_refusal(response: httpx2.Response) -> None:
    if not response.is_success:
        body = bytearray()
        # status and headers are an answer, whatever becomes of the words
        with suppress(httpx2.RequestError, httpx2.StreamError, TimeoutError):
            async with asyncio.timeout(_ERROR_S):
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _ERROR_BYTES:
                        break
        raise RefusedError(response, bytes(body[:_ERROR_BYTES]))


def to_json(fields: dict[str, Any]) -> bytes:
    """Return the body of a request.

    By what the SDK's models are made of: 2,048 texts of 550 characters take 0.5 ms, for which nothing else can run;
    with `json` they take 4.8 ms.
    """
    return pydantic_core.to_json(fields)


async def read(response: Any, limit: int, take: Take) -> None:
    """Read the body of a response, of whichever client's, and hand it on piece by piece.

    Raises:
        ProtocolError: It is longer than the limit; it was not read to its end.
    """
    size = 0

    def checked(piece: memoryview) -> None:
        nonlocal size
        size += len(piece)
        if size > limit:
            raise ProtocolError(f"expected a reply of at most {limit:,} bytes, got more")
        take(piece)

    receive = response.extensions.get(_RECEIVE)
    if receive is not None and response.headers.get("content-encoding", "identity") == "identity":
        await receive(checked)
        return
    async for chunk in response.aiter_bytes():
        for start in range(0, len(chunk), PIECE_BYTES):
            checked(memoryview(chunk)[start : start + PIECE_BYTES])
            if len(chunk) > PIECE_BYTES:
                await asyncio.sleep(0)


class Transport(httpx2.AsyncBaseTransport):
    """HTTP/1.1 on kept-alive connections, one request at a time on each. Belongs to one event loop.

    Of timeouts it knows the one to connect; for the rest the caller has a deadline.

    Args:
        connections: How many may be open at once; who needs one more waits.
        tls: For https.
    """

    def __init__(self, connections: int, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._free = asyncio.Semaphore(connections)
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        """The one that was used last is at the end, and used next."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await self._free.acquire()
        connection: Connection | None = None
        try:
            connection = self._kept(request.url) or await self._connect(request)
            with _as_httpx2():
                head = await connection.exchange(request)
        except BaseException:
            self.done(connection, reusable=False)
            raise
        body = _Body(self, connection, head)
        extensions: dict[str, Any] = {"http_version": b"HTTP/" + head.http_version, "reason_phrase": head.reason}
        if body.length is not None:
            extensions[_RECEIVE] = body.receive
        headers = head.headers.raw_items()
        return httpx2.Response(head.status_code, headers=headers, stream=body, extensions=extensions)

    def _kept(self, url: httpx2.URL) -> Connection | None:
        now = asyncio.get_running_loop().time()
        for connection in list(self._idle):
            if now - connection.idle_since > _KEPT_S:
                connection.abort()
        fitting = [connection for connection in self._idle if connection.origin == _origin(url) and connection.is_open]
        if not fitting:
            return None
        self._idle.remove(fitting[-1])
        return fitting[-1]

    async def _connect(self, request: httpx2.Request) -> Connection:
        scheme, host, port = origin = _origin(request.url)
        tls: dict[str, Any] = {"ssl": self._tls or True, "server_hostname": host} if scheme == "https" else {}
        loop = asyncio.get_running_loop()
        connection = Connection(self, origin)
        with _as_httpx2(httpx2.ConnectError):
            try:
                async with asyncio.timeout(request.extensions.get("timeout", {}).get("connect")):
                    sock = await connected(host, port)
                    try:
                        await loop.create_connection(lambda: connection, sock=sock, **tls)
                    except BaseException:
                        connection.connection_lost(None)  # uvloop does not say so if it was made before this
                        raise
            except TimeoutError as error:
                raise httpx2.ConnectTimeout("no connection in time") from error
        return connection

    def done(self, connection: Connection | None, *, reusable: bool) -> None:
        """A request has ended, with its connection if it came to one."""
        self._free.release()
        if connection is not None and reusable and connection.is_open and connection.is_sent:
            connection.rest(asyncio.get_running_loop().time())
            self._idle.append(connection)
        elif connection is not None:
            connection.abort()

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    async def aclose(self) -> None:
        while self._open:
            connection = next(iter(self._open))
            connection.abort()
            await connection.ended.wait()


class Connection(asyncio.BufferedProtocol):
    """One connection and the request on it. Reads only while somebody waits for what comes, or nobody for anything."""

    def __init__(self, owner: Transport, origin: Origin) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.ended = asyncio.Event()
        self._owner = owner
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._take: Take | None = None
        self._news: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._at_end = False
        self._h11 = h11.Connection(h11.CLIENT)

    # ---- what asyncio calls ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass
        self._transport.pause_reading()
        self._owner.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._take is None:
            self.abort()  # nobody has asked for anything
            return
        try:
            self._take(self._buffer[:nbytes])
        except Exception as error:
            self._tell(error)

    def eof_received(self) -> None:
        self.abort()  # a TLS connection would wait for half a minute to say goodbye
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()
        self._owner.closed(self)
        self._end(error)

    # ---- what its owner calls ----

    @property
    def is_open(self) -> bool:
        return not (self._at_end or self._transport.is_closing())

    @property
    def is_done(self) -> bool:
        """Whether request and answer, read with `next_event`, are at their ends, and another request may follow."""
        is_done = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        return is_done and not self._h11.trailing_data[0]  # nobody has asked for what came after it

    @property
    def is_sent(self) -> bool:
        return self._transport.get_write_buffer_size() == 0

    def abort(self) -> None:
        self._transport.abort()

    def rest(self, now: float) -> None:
        """Wait for the next request, and notice if the server closes or says something unasked."""
        self.idle_since = now
        self._transport.resume_reading()

    async def exchange(self, request: httpx2.Request) -> h11.Response:
        """Send a request and return the head of its answer."""
        self._transport.pause_reading()
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LONGEST_HEAD)
        url = request.url
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        events = [
            h11.Request(method=request.method, target=url.raw_path, headers=request.headers.raw),
            *[h11.Data(data=chunk) async for chunk in request.stream],
            h11.EndOfMessage(),
        ]
        self._transport.write(b"".join(self._h11.send(event) or b"" for event in events))
        while True:
            event = await self.next_event()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise httpx2.RemoteProtocolError("expected an answer")

    async def next_event(self) -> Any:
        """Return the next event of h11's, read as far as that needs."""
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            await self._receive(self._one_piece)
            if self._at_end:
                self._h11.receive_data(b"")
        return event

    def _one_piece(self, piece: memoryview) -> None:
        self._h11.receive_data(bytes(piece))
        self._tell(None)

    async def receive_body(self, length: int, take: Take) -> None:
        """Hand on so many bytes, the first of which came with the head."""
        missing = length

        def count(piece: memoryview) -> None:
            nonlocal missing
            surplus = len(piece) - missing
            missing = max(0, -surplus)
            take(piece[: len(piece) - surplus] if surplus > 0 else piece)
            if surplus > 0:
                self.abort()
            if not missing:
                self._tell(None)

        count(memoryview(self._h11.trailing_data[0]))
        if missing:
            await self._receive(count)
        if missing:
            raise httpx2.RemoteProtocolError(f"the connection was closed with {missing:,} bytes missing")

    async def _receive(self, take: Take) -> None:
        """Hand on what comes until `_tell` or `_end` is called."""
        if not self._at_end:
            self._news = asyncio.get_running_loop().create_future()
            self._take = take
            try:
                if self.is_open:  # else only the end is to come
                    self._transport.resume_reading()
                await self._news
            finally:
                self._take = self._news = None
                if self.is_open:
                    self._transport.pause_reading()
        if self._error is not None:
            raise self._error

    def _end(self, error: Exception | None) -> None:
        self._at_end = True
        self._tell(error)

    def _tell(self, error: Exception | None) -> None:
        self._error = self._error or error
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class _Body(httpx2.AsyncByteStream):
    """The body of an answer, read either way: whole by `receive`, or chunk by chunk as httpx2 does it."""

    def __init__(self, owner: Transport, connection: Connection, head: h11.Response) -> None:
        self._owner = owner
        self._connection = connection
        headers = dict(head.headers)  # names in lower case
        is_plain = head.status_code == 200 and b"content-length" in headers and b"transfer-encoding" not in headers
        self.length = int(headers[b"content-length"]) if is_plain else None
        connection_options = [value.lower() for name, value in head.headers if name == b"connection"]
        self._may_stay = head.http_version == b"1.1" and b"close" not in b",".join(connection_options)
        self._reusable = False
        self._closed = False

    async def receive(self, take: Take) -> None:
        assert self.length is not None
        with _as_httpx2():
            await self._connection.receive_body(self.length, take)
        self._reusable = self._may_stay

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx2():
            while isinstance(event := await self._connection.next_event(), h11.Data):
                yield bytes(event.data)
        self._reusable = self._connection.is_done

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._owner.done(self._connection, reusable=self._reusable)


def _origin(url: httpx2.URL) -> Origin:
    scheme = url.scheme
    return scheme, url.raw_host.decode("ascii"), url.port or (443 if scheme == "https" else 80)


@contextmanager
def _as_httpx2(kind: type[httpx2.NetworkError] = httpx2.ReadError) -> Iterator[None]:
    """Raise what httpx2's own transport would."""
    try:
        yield
    except h11.LocalProtocolError as error:
        raise httpx2.LocalProtocolError("the request cannot be sent") from error
    except h11.RemoteProtocolError as error:
        raise httpx2.RemoteProtocolError("the answer is no HTTP") from error
    except (OSError, UnicodeError) as error:  # the latter of a host name that cannot be one
        raise kind("the connection failed") from error
