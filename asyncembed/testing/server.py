"""`EmbeddingServer`: a real HTTP server on the loopback interface that answers like OpenAI's embeddings API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from ..batching.tokens import load_counter
from .dialects import OPENAI, Dialect, Wording
from .faults import Fault
from .http import MAX_HEAD_BYTES, BadHTTPError, ClientLeftError, HTTPRequest, Wire
from .rate_limits import ServerRateLimits
from .replies import Answer, CountTokens, ParsedRequest, RefusedRequestError, error_answer, estimate_tokens
from .request_log import LoggedRequest, RequestLog
from .schedules import Schedule, script
from .service import EmbeddingService

P = ParamSpec("P")
T = TypeVar("T")

# Requests up to this size block the loop for less than a millisecond; larger ones are processed in a thread.
_SMALL_BODY_BYTES = 16 * 1024
_FEW_TEXTS = 16
# With a shorter backlog, clients that open thousands of connections at once would wait a second for a repeated SYN.
_BACKLOG = 4_096
_NO_FAULT = Fault()


class EmbeddingServer:
    """A server that answers `POST /v1/embeddings` as OpenAI does, with its limits, errors and rate limits, and faults.

    `async with EmbeddingServer() as server:` runs it in the running loop; `with EmbeddingServer().in_thread()` runs it
    in its own loop and thread. Point a client at `server.base_url`. Every vector is `embedding_of(text)`.

    Args:
        host: The address to listen at.
        port: 0 for any free port.
        dimensions: The size of all vectors; None for each model's own, or 1,536 if the model is unknown.
        models: The models that exist; None accepts any name.
        api_key: The only valid API key; None accepts requests with any key, or without one.
        dialect: The kind of server to imitate; see `dialects`. The next three arguments replace limits of it.
        max_inputs: Limit of inputs per request.
        max_tokens_per_input: Limit of tokens per input.
        max_tokens_per_request: Limit for all inputs together, in tokens and in bytes / 4.
        max_body_bytes: A longer body is answered with 413 and not read.
        requests_per_minute: Rate limit; refused requests count, too. None for no limit.
        tokens_per_minute: Rate limit in tokens or bytes / 4, whichever is more. None for no limit.
        burst_s: A burst may use the refill of this many seconds at once. OpenAI's account pages state limits per
            minute; its guide warns that they may be enforced per second.
        filled: How full the rate limits start, from 0 to 1. With 0 they bind from the first request, so that a test of
            a limit per minute need not last minutes.
        latency_s: Seconds before each answer with vectors.
        latency_per_token_s: Further seconds for each token.
        faults: A schedule of faults, or the faults of the next requests in order.
        count_tokens: Counts the tokens of texts; None for OpenAI's tokenizer, or bytes / 4 if it is not available.
        keep_texts: Whether the log keeps the texts.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        dimensions: int | None = None,
        models: Sequence[str] | None = None,
        api_key: str | None = None,
        dialect: Dialect = OPENAI,
        max_inputs: int | None = None,
        max_tokens_per_input: int | None = None,
        max_tokens_per_request: int | None = None,
        max_body_bytes: int | None = None,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        burst_s: float = 60.0,
        filled: float = 1.0,
        latency_s: float = 0.0,
        latency_per_token_s: float = 0.0,
        faults: Schedule | Sequence[Fault | None] = (),
        count_tokens: CountTokens | None = None,
        keep_texts: bool = True,
    ) -> None:
        dialect = replace(
            dialect,
            max_inputs=max_inputs or dialect.max_inputs,
            max_tokens_per_input=max_tokens_per_input or dialect.max_tokens_per_input,
            max_tokens_per_request=max_tokens_per_request or dialect.max_tokens_per_request,
        )
        rates = ServerRateLimits(requests_per_minute, tokens_per_minute, burst_s, filled)
        self._service = EmbeddingService(dialect, dimensions, models, api_key, rates)
        self.host = host
        self.port = port
        self.faults: Schedule = faults if callable(faults) else script(faults)
        self._max_body_bytes = max_body_bytes
        self._latency_s = latency_s
        self._latency_per_token_s = latency_per_token_s
        self._count_tokens = count_tokens
        self._keep_texts = keep_texts
        self._log = RequestLog()
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._closing = False
        self._server: asyncio.Server | None = None
        self._threads: ThreadPoolExecutor | None = None

    # ---- state that tests read ----

    @property
    def base_url(self) -> str:
        """The base URL for clients, ending in `/v1`."""
        return f"{self.url}/v1"

    @property
    def url(self) -> str:
        """Scheme, host and port only, for Azure's `azure_endpoint`."""
        return f"http://{self.host}:{self.port}"

    @property
    def requests(self) -> list[LoggedRequest]:
        """The log: all requests, in the order of arrival."""
        return self._log.requests

    @property
    def in_flight(self) -> int:
        """The number of requests that are being answered now."""
        return self._log.in_flight

    @property
    def max_in_flight(self) -> int:
        """The largest number of requests that were being answered at once."""
        return self._log.max_in_flight

    @property
    def connections(self) -> int:
        """The number of connections that were opened."""
        return self._connections

    @property
    def total_tokens(self) -> int:
        """The billed tokens: the sum of the usage in all replies."""
        return sum(request.billed_tokens for request in self.requests)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition is true; it is checked whenever a request begins or ends. Only in the server's loop.

        For instance `await server.until(lambda: server.in_flight == 8)`.
        """
        while not condition():
            await self._log.change_of_state()

    def clear(self) -> None:
        """Empty the log. The numbering of requests continues."""
        self._log.clear()

    def __repr__(self) -> str:
        state = self.base_url if self._server else "closed"
        return f"<EmbeddingServer {state}: {len(self.requests)} requests, {self.in_flight} in flight>"

    # ---- opening and closing ----

    async def start(self) -> Self:
        """Start to listen. A closed server can be started again, on the same port.

        Raises:
            OSError: The port is in use.
        """
        if self._count_tokens is None:
            self._count_tokens = await _default_counter()
        self._closing = False
        self._threads = ThreadPoolExecutor(2, "asyncembed-testing")
        self._server = await asyncio.start_server(
            self._connected, self.host, self.port, limit=MAX_HEAD_BYTES, backlog=_BACKLOG
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def aclose(self) -> None:
        """Drop all connections, requests in flight included, and stop listening. Leaves no task, thread or socket.

        Raises:
            Exception: An error in your schedule, fault or token counter. The server is closed anyway.
        """
        server, self._server = self._server, None
        if server is None or self._threads is None:
            return
        self._closing = True
        server.close()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        await server.wait_closed()
        self._threads.shutdown()
        if self._errors:
            raise self._errors.pop()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @contextmanager
    def in_thread(self) -> Iterator[Self]:
        """Run in a separate thread, for code that is not async."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def serve() -> None:
            done = asyncio.Event()
            async with self:
                started.set_result((asyncio.get_running_loop(), done))
                await done.wait()

        with ThreadPoolExecutor(1, "asyncembed-testing-server") as pool:
            running = pool.submit(asyncio.run, serve())
            both: list[Future[Any]] = [started, running]
            wait(both, return_when=FIRST_COMPLETED)
            if running.done():
                running.result()  # raises: it could not start
            loop, done = started.result()
            try:
                yield self
            finally:
                loop.call_soon_threadsafe(done.set)
            running.result()

    # ---- serving ----

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closing:  # the server was closed between the connection and this call
            writer.transport.abort()
            return
        self._connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(Wire(reader, writer, self._max_body_bytes)))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)

    async def _serve(self, wire: Wire) -> None:
        try:
            try:
                while not wire.closing and (http := await wire.read()) is not None:
                    await self._respond(wire, http)
            except BadHTTPError as error:
                wire.close()
                await wire.send(error_answer(Wording(error.status, str(error)), OPENAI))
            await wire.aclose()
        except (ClientLeftError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            wire.abort()

    async def _respond(self, wire: Wire, http: HTTPRequest) -> None:
        begun_s = time.monotonic()
        assert self._count_tokens is not None
        large = len(http.body) > _SMALL_BODY_BYTES
        parsed = await self._run(large, self._service.read, http, self._count_tokens)
        request = self._logged(http, parsed, begun_s)
        fault = request.fault or _NO_FAULT
        wire.on_answer = partial(self._log.answered, request.number)
        try:
            answer = await self._answer(wire, http, parsed, fault, request.number)
            headers = {
                "x-request-id": f"req_{request.number:032x}",
                "openai-processing-ms": str(round((time.monotonic() - begun_s) * 1000)),
                **answer.headers,
            }
            await fault.send(wire, replace(answer, headers=headers))
        finally:
            self._log.end(request.number)

    def _logged(self, http: HTTPRequest, parsed: ParsedRequest | Wording, now_s: float) -> LoggedRequest:
        request = LoggedRequest(self._log.next_number(), now_s, http.path, http.headers)
        if isinstance(parsed, ParsedRequest):
            request = replace(
                request,
                model=parsed.model,
                texts=parsed.texts,
                inputs=len(parsed.texts),
                tokens=parsed.tokens,
                estimated_tokens=parsed.estimated_tokens,
                dimensions=parsed.dimensions,
                base64=parsed.base64,
            )
        request = replace(request, fault=self.faults(request))
        self._log.begin(request if self._keep_texts else replace(request, texts=()))
        return request

    async def _answer(
        self, wire: Wire, http: HTTPRequest, parsed: ParsedRequest | Wording, fault: Fault, number: int
    ) -> Answer:
        other = await self._run(fault is not _NO_FAULT, fault.answer)
        if other is not None:
            return other
        try:
            admitted = self._service.admit(http, parsed, time.monotonic())
        except RefusedRequestError as refused:
            answer = self._service.refuse(refused)
        else:
            latency_s = self._latency_s + self._latency_per_token_s * admitted.tokens
            if latency_s > 0:
                await wire.sleep(latency_s)
            answer = await self._run(len(admitted.texts) > _FEW_TEXTS, self._service.answer, admitted, fault)
            self._log.change(number, billed_tokens=admitted.tokens)
        return replace(answer, headers={**self._service.headers(time.monotonic()), **answer.headers})

    async def _run(self, large: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if not large:
            return work(*args, **kwargs)
        call = partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


async def _default_counter() -> CountTokens:
    counter = await load_counter("cl100k_base")
    return counter.count if counter.exact else estimate_tokens
