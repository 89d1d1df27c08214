"""`Embedder`: a long-lived object that turns texts into vectors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, aclosing
from types import TracebackType
from typing import Any, NoReturn, Self

from .. import models
from ..batching.batch import Receiver
from ..batching.packing import OPEN_BATCHES, Limits
from ..batching.texts import TooLong
from ..batching.tokens import TokenCounter, load_counter
from ..caches import open_cache
from ..concurrency import PerLoop, cancel_and_wait
from ..errors import ConfigError, InputError
from ..metrics import Observer, Stats
from ..options import check_amount, check_model, check_range
from ..providers.credentials import ApiKey
from ..providers.local import LocalCounter, LocalProvider
from ..providers.openai import OpenAIProvider
from ..report import Check, EmbeddingResult, Plan, ProgressCallback, Usage, failed
from ..sending.attempts import MAX_BACKING_OFF, Endpoint
from ..sending.context import CallContext
from ..sending.feeding import Slices
from ..sending.pacing import ConcurrencyLimiter, shared_rate_limiter
from ..sending.recorder import MetricsRecorder
from ..sources.records import AnyIterable
from ..types import Cache, EmbeddedRecord, Provider, Vectors, check_text, info_of
from .caching import CacheClient
from .dispatcher import Dispatcher
from .inputs import as_list, unique_texts
from .planning import count_up
from .results import Results
from .stream import OrderedStream

# Containers are killed 10 to 30 s after SIGTERM; most requests take less than a second.
CLOSE_GRACE_S = 10.0


class Embedder:
    """Turns texts into vectors: packs them into few requests, respects rate limits, retries, and checks replies.

    One object serves many tasks at once, and one event loop after another. Creating it is cheap and sends nothing.

    Args:
        model: The name of the model, or of the deployment on Azure; "local" is the local model (extra `local`).
        client: An `AsyncOpenAI` or `AsyncAzureOpenAI` to use; never closed.
        http_client: An `AsyncClient` of httpx or httpx2 to use; never closed.
        provider: Any `types.Provider`, instead of the options for OpenAI.
        api_key: The key, or an async function that returns it. Default: the environment variable `OPENAI_API_KEY`.
        base_url: The address of the API. Default: the environment variable `OPENAI_BASE_URL`, else OpenAI itself.
        dimensions: The size of shortened vectors. Not every model can shorten its vectors.
        max_batch_size: Texts per request, 1 to 2,048.
        max_tokens_per_batch: Tokens per request; a text counts as max(tokens, UTF-8 bytes / 4).
        max_tokens_per_text: Tokens that the model accepts in one text.
        too_long: How longer texts are treated: "error" fails them, "truncate" embeds their beginning, "mean" embeds
            their pieces and returns the mean, weighted by tokens, at unit length.
        concurrency: Requests in flight at once.
        requests_per_minute, tokens_per_minute: Limits to keep. Limits in the provider's headers are kept anyway.
        max_retries: How often a batch is sent again while no request succeeds.
        timeout: Wall-clock seconds for one attempt.
        observer: Receives an event for every request; see `metrics.Observer` and `otel.OpenTelemetry`.
        max_waiting: Texts of `embed_one` and small `embed` calls that may wait for their vectors at once.
        cache: Returns vectors of texts that were embedded before: True for a cache in memory, a path for one in an
            SQLite file, or any `types.Cache`, which is never closed.
        allow_insecure_http: Whether key and texts may be sent unencrypted to another machine.

    Raises:
        ConfigError: An option is out of range, or there is no usable key or address. It is a ValueError.
    """

    def __init__(
        self,
        model: str,
        *,
        client: Any = None,
        http_client: Any = None,
        provider: Provider | None = None,
        api_key: ApiKey | None = None,
        base_url: str | None = None,
        dimensions: int | None = None,
        max_batch_size: int = models.MAX_INPUTS,
        max_tokens_per_batch: int = models.MAX_TOKENS_PER_REQUEST,
        max_tokens_per_text: int = models.MAX_TOKENS_PER_TEXT,
        too_long: TooLong = "error",
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_retries: int = 8,
        timeout: float = 60.0,
        max_waiting: int = 20_000,
        observer: Observer | None = None,
        cache: Cache | str | os.PathLike[str] | bool | None = None,
        allow_insecure_http: bool = False,
    ) -> None:
        check_model(model, dimensions, too_long)
        check_range("max_batch_size", max_batch_size, 1, models.MAX_INPUTS)
        check_range("max_tokens_per_batch", max_tokens_per_batch, 1)
        check_range("max_tokens_per_text", max_tokens_per_text, 1)
        check_range("concurrency", concurrency, 1)
        check_range("max_retries", max_retries, 0)
        check_range("max_waiting", max_waiting, 1)
        check_amount("timeout", timeout)
        check_amount("requests_per_minute", requests_per_minute)
        check_amount("tokens_per_minute", tokens_per_minute)
        self.model = model
        self.concurrency = concurrency
        self._facts = models.lookup(model)
        self._limits = Limits(max_batch_size, max_tokens_per_batch, max_tokens_per_text)
        self._too_long = too_long
        self._per_minute = (requests_per_minute, tokens_per_minute)
        self._max_retries = max_retries
        self._max_waiting = max_waiting
        self._dispatchers = PerLoop(self._new_dispatcher)
        self._closing = PerLoop(asyncio.Lock)
        self._asked_dimensions = dimensions
        self._provider: Provider = provider or (
            LocalProvider(dimensions)
            if model == "local" and client is None and base_url is None
            else OpenAIProvider(
                model,
                dimensions=dimensions,
                timeout=timeout,
                client=client,
                http_client=http_client,
                api_key=api_key,
                base_url=base_url,
                connections=concurrency,
                allow_insecure_http=allow_insecure_http,
            )
        )
        self._metrics = MetricsRecorder(model, self._provider, observer)
        opened, is_ours = open_cache(cache)
        self._own_cache = opened if is_ours else None
        self._cache = None if opened is None else self._new_cache_client(opened)

    def __repr__(self) -> str:
        host = info_of(self._provider).host
        dispatcher = self._dispatchers.peek()
        status = f"0 of {self.concurrency} requests under way" if dispatcher is None else dispatcher.status()
        return f"<Embedder {self.model!r}{f' at {host}' if host else ''}: {status}>"

    def stats(self) -> Stats:
        """Return the counts since the embedder was created, and its present state. Cheap; safe in any thread."""
        here = [(loop, dispatcher) for loop, dispatcher in self._dispatchers.items() if not loop.is_closed()]
        limiters = [(loop, dispatcher.endpoint.limiter) for loop, dispatcher in here]
        return self._metrics.stats(
            under_way=sum(limiter.in_flight for _, limiter in limiters),
            waiting=sum(limiter.waiting for _, limiter in limiters),
            gathering=sum(dispatcher.coalescer.queued for _, dispatcher in here),
            paused_for_s=max((0.0, *(limiter.rate.paused_until - loop.time() for loop, limiter in limiters))),
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Embedder holds a key and connections: make one in each process, do not pickle it")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose(CLOSE_GRACE_S if error is None else 0.0)

    async def aclose(self, grace: float = CLOSE_GRACE_S) -> None:
        """Wait for running calls, then close the connections. Clients that were passed in stay open.

        Args:
            grace: Seconds to wait, at most. Calls that are unfinished then raise a `TransportError`; for `embed`, its
                `.result` holds the finished texts. A `stream` is ended at once. A batch that is being stored then has
                10 s more.
        """
        # a concurrent `aclose()` waits for the first one to finish
        async with self._closing.get(), AsyncExitStack() as stack:
            if self._own_cache is not None:
                stack.push_async_callback(self._own_cache.aclose)
            stack.push_async_callback(self._provider.aclose)
            dispatcher = self._dispatchers.pop()
            if dispatcher is not None:
                await dispatcher.aclose(grace)

    @property
    def dimensions(self) -> int | None:
        """The size of the vectors; None while it is unknown."""
        return self._asked_dimensions or info_of(self._provider).dimensions

    async def embed(
        self,
        texts: Iterable[str],
        *,
        on_progress: ProgressCallback | None = None,
        deadline: float | None = None,
    ) -> EmbeddingResult:
        """Return one vector per text. A text that fails does not affect the others. Duplicates are sent once.

        A call with few texts shares requests with other calls, as `embed_one` does. A shared request counts for each
        of its calls, and its tokens are divided among them.

        Args:
            texts: At least one; none of them empty.
            on_progress: Called with a `Progress` after every batch.
            deadline: Seconds for the whole call, waiting included.

        Raises:
            TypeError: `texts` is a single str, or holds something that is not a str. Nothing was sent.
            ValueError: `texts` is empty, or holds an empty text. Nothing was sent.
            AllFailedError: No text was embedded; `.result` has the reasons.
            FatalProviderError: Further requests would fail, too (wrong key, no quota, unknown model, an outage).
                `.result` holds the finished texts.
            DeadlineError: The deadline passed. `.result` holds the finished texts. Nothing is left running.
            OverloadedError: `max_waiting` texts of small calls are waiting already. Nothing was sent.
        """
        contents = as_list(texts)
        call = CallContext(deadline)
        results = Results(len(contents), call, on_progress)
        async with call.until_deadline():
            different = await unique_texts(contents)
            dispatcher = self._dispatchers.get()
            if on_progress is None and dispatcher.is_small(different):
                await dispatcher.embed_shared(different, call, results)
            else:
                await dispatcher.embed_bulk(different, call, results)
        result = results.finish(self.dimensions, self.cost_usd(call.usage), call.stopped_by)
        if call.stopped_by is not None:
            call.stopped_by.result = result
            raise call.stopped_by
        if len(result.failures) == len(result):
            raise failed(result)
        return result

    async def embed_one(self, text: str, *, deadline: float | None = None) -> Vectors:
        """Return the vector float32[d] of one text. Concurrent calls share requests; duplicates share one input.

        A lone call is sent at once. While two shared requests are in flight, further calls are queued and share the
        next request. Cancelling one call does not affect the others.

        Args:
            text: Not empty.
            deadline: Seconds for this call, waiting included.

        Raises:
            DeadlineError: The deadline passed.
            OverloadedError: `max_waiting` texts are waiting already. Nothing was sent.
            AsyncEmbedError: The text failed. Each call gets its own error object.
        """
        try:
            check_text(text)
        except InputError as error:
            raise type(error)(f"text {error}") from None
        call, vector = CallContext(deadline), None
        async with call.until_deadline():
            vector = await self._dispatchers.get().embed_one(text, call)
        if vector is not None:
            return vector
        assert call.stopped_by is not None
        raise call.stopped_by

    async def check(self, *, deadline: float | None = 10.0) -> Check:
        """Check key, address, model and dimensions with one request of one token.

        It is sent before other requests and not retried. It waits for a pause that the provider has requested.

        Args:
            deadline: Seconds for the check, waiting included.

        Raises:
            ProviderError: The request failed: an `AuthenticationError`, a `NotFoundError`, a `TransportError`, …
            ConfigError: The size of the vectors differs from the model's known dimensions.
            DeadlineError: The deadline passed.
        """
        call = CallContext(deadline, urgent=True)
        known, found = self.dimensions, 0
        async with call.until_deadline():
            found = await self._dispatchers.get().check(call)
        if call.stopped_by is not None:
            raise call.stopped_by
        if known not in (None, found):
            raise ConfigError(f"the provider answers with {found} dimensions; {self.model} has {known}")
        usage = call.usage
        return Check(self.model, found, usage.tokens if usage.tokens_known else None, call.elapsed_s)

    async def stream(
        self, records: AnyIterable, *, deadline: float | None = None
    ) -> AsyncGenerator[EmbeddedRecord, None]:
        """Yield each record with its vector or its error, in order, while the source is still being read.

        Memory is bounded: the source is read only a limited distance ahead. If the loop is left early, requests in
        flight are cancelled; use `async with contextlib.aclosing(...)` to have that happen at once.

        Args:
            records: Any sync or async iterable of records, in any of their forms, or of texts. The id of a text is
                its position.
            deadline: Seconds for the whole stream, waiting included.

        Raises:
            FatalProviderError: Further requests would fail, too. All finished records have been yielded.
            DeadlineError: The deadline passed. All finished records have been yielded.
            Exception: The source's own error, unchanged. All records before it have been yielded.
        """
        call = CallContext(deadline)
        ordered = OrderedStream(most_ahead=(self.concurrency + 1) * self._limits.inputs)
        running = asyncio.create_task(self._embed_stream(records, call, ordered))
        running.add_done_callback(lambda _: ordered.end())
        try:
            async for item in ordered.items():
                yield item
            await running
        finally:
            await cancel_and_wait(running)
        if call.stopped_by is not None:
            raise call.stopped_by

    async def _embed_stream(self, records: AnyIterable, call: CallContext, ordered: OrderedStream) -> None:
        async with call.until_deadline(), aclosing(ordered.slices(records)) as slices:
            dispatcher = self._dispatchers.get()
            await dispatcher.embed_slices(slices, call, ordered, open_batches=1, ends_by_itself=False)

    async def plan(self, texts: AnyIterable) -> Plan:
        """Estimate requests, tokens, time and price of embedding the texts. Sends nothing.

        Args:
            texts: Any sync or async iterable of texts, or of records in any of their forms.
        """
        counter = await self._counter()
        counted = await count_up(texts, counter, self._limits, self._too_long)
        return Plan(
            texts=counted.inputs,
            failures=tuple(sorted(counted.failures, key=lambda failure: failure.index)),
            requests=counted.requests,
            tokens=counted.tokens,
            exact=counter.exact,
            seconds=self._seconds(counted.requests, counted.tokens),
            cost_usd=self._price(counted.tokens),
        )

    # ---- used by `pipeline` ----

    async def embed_slices(self, slices: Slices, call: CallContext, receiver: Receiver) -> None:
        """Embed slices of texts. A batch holds its concurrency slot until the receiver has taken the outcome."""
        await self._dispatchers.get().embed_slices(slices, call, receiver)

    @property
    def max_in_flight(self) -> int:
        """The number of texts that may be read from a source and not yet stored."""
        return (self.concurrency + 1 + MAX_BACKING_OFF + OPEN_BATCHES) * self._limits.inputs

    def cost_usd(self, usage: Usage) -> float | None:
        """Return the list price of a call's tokens; None if price or count is unknown."""
        return self._price(usage.tokens) if usage.tokens_known else None

    def _price(self, tokens: int) -> float | None:
        price = self._facts.usd_per_million_tokens
        return None if price is None else tokens * price / 1_000_000

    def _seconds(self, requests: int, tokens: int) -> float | None:
        amounts = zip((requests, tokens), self._per_minute, strict=True)
        return max((amount / per_minute * 60 for amount, per_minute in amounts if per_minute), default=None)

    def _new_dispatcher(self) -> Dispatcher:
        # Limits are counted per address, key and model. A provider without an identity shares no limiter.
        place = info_of(self._provider).identity or id(self._provider)
        rate = shared_rate_limiter((place, self.model))
        rate.limit(*self._per_minute)
        endpoint = Endpoint(
            self._provider,
            ConcurrencyLimiter(rate, self.concurrency),
            self._limits,
            recorder=self._metrics.here(),
            too_long=self._too_long,
            max_retries=self._max_retries,
        )
        return Dispatcher(endpoint, self._cache, self._counter, max_waiting=self._max_waiting)

    def _new_cache_client(self, cache: Cache) -> CacheClient:
        limits, kind = self._limits, type(self._provider)
        settings = {
            "place": info_of(self._provider).base_url or f"{kind.__module__}.{kind.__qualname__}",
            "model": self.model,
            "dimensions": self._asked_dimensions,
            # these decide which part of a long text is embedded
            "too_long": self._too_long,
            "tokens_per_text": min(limits.tokens_per_text, limits.tokens),
        }
        return CacheClient(
            cache, settings, lambda: self.dimensions, lambda hits, misses: self._metrics.here().cached(hits, misses)
        )

    async def _counter(self) -> TokenCounter:
        if isinstance(self._provider, LocalProvider):
            return LocalCounter()
        return await load_counter(self._facts.encoding)
