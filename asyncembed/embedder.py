"""`Embedder`: one long-lived object that turns texts into vectors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, NoReturn, Self

from . import models
from .arguments import check_amount, check_model, check_range, checked, listed
from .coalescing import Coalescer
from .engine import Deliver, Engine, portions
from .errors import InputError
from .gathering import Order, Results, readable
from .loops import PerLoop, ended
from .pacing import Slots, shared_pace
from .packing import Limits, Packer
from .providers.local import LocalCounter, LocalProvider
from .providers.openai import OFFICIAL_HOST, OpenAIProvider
from .providers.safety import ApiKey
from .records import AnyIterable, in_slices
from .report import EmbeddingResult, Plan, ProgressCallback, failed
from .run import Run
from .tokens import ByteBound, TokenCounter, load_counter
from .types import EmbeddedRecord, Failure, Provider, Vectors
from .weighing import Text, TooLong, check_text, unique, weigh_texts


class Embedder:
    """Turns texts into vectors: packed into few requests, paced, retried, and checked.

    One object serves many tasks at once, and one event loop after another. Making it is cheap and sends nothing.

    Args:
        model: The model's name, on Azure the deployment's; "local" is the embedded model (extra `local`).
        client: A ready `AsyncOpenAI` or `AsyncAzureOpenAI`; used as it is, never closed.
        http_client: A ready httpx or httpx2 `AsyncClient`; used as it is, never closed.
        provider: Any `types.Provider`, in place of all the options for OpenAI.
        api_key: The key, or an async function that returns it. Default: the environment's `OPENAI_API_KEY`.
        base_url: Default: the environment's `OPENAI_BASE_URL`, else OpenAI itself.
        dimensions: Ask for shorter vectors; only some models shorten.
        max_batch_size: Texts a request, 1 to 2,048.
        max_tokens_per_batch: Tokens a request; a text weighs max(tokens, UTF-8 bytes / 4).
        max_tokens_per_text: Tokens the model takes in one text.
        too_long: What becomes of a longer one: "error" fails it, "truncate" embeds its beginning, "mean" embeds
            its pieces and takes their mean, weighted by tokens, at unit length.
        concurrency: Requests under way at once.
        requests_per_minute, tokens_per_minute: Stay below these. Limits that the provider's headers tell are
            kept without being given here.
        max_retries: How often a batch is sent again while nothing succeeds.
        timeout: Seconds, wall-clock, for one attempt.
        allow_insecure_http: Whether key and texts may travel in clear beyond this machine.

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
        allow_insecure_http: bool = False,
    ) -> None:
        check_model(model, dimensions, too_long)
        check_range("max_batch_size", max_batch_size, 1, models.MAX_INPUTS)
        check_range("max_tokens_per_batch", max_tokens_per_batch, 1)
        check_range("max_tokens_per_text", max_tokens_per_text, 1)
        check_range("concurrency", concurrency, 1)
        check_range("max_retries", max_retries, 0)
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
        self._engines = PerLoop(self._new_engine)
        self._coalescers = PerLoop(lambda: Coalescer(self._send, self._limits.inputs))
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

    def __repr__(self) -> str:
        host = getattr(self._provider, "host", None)
        return f"<Embedder {self.model!r}{f' at {host}' if host else ''} concurrency={self.concurrency}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Embedder holds a key and connections: make one in each process, do not pickle it")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections that were opened here; clients that were handed in stay open."""
        coalescer = self._coalescers.pop()
        self._engines.pop()
        try:
            if coalescer is not None:
                await coalescer.aclose()
        finally:
            await self._provider.aclose()

    @property
    def dimensions(self) -> int | None:
        """The size of the vectors; None while nobody can know it."""
        if self._asked_dimensions is not None:
            return self._asked_dimensions
        known = getattr(self._provider, "dimensions", None)
        if known is None and getattr(self._provider, "host", None) == OFFICIAL_HOST:
            # elsewhere a well-known name may stand for any model
            return self._facts.dimensions
        return known

    async def embed(
        self,
        texts: Iterable[str],
        *,
        on_progress: ProgressCallback | None = None,
        deadline: float | None = None,
    ) -> EmbeddingResult:
        """Return one vector a text; texts that fail fail alone. Equal texts are sent once.

        Args:
            texts: At least one; none of them empty.
            on_progress: Called with a `Progress` after every batch.
            deadline: Seconds for the whole call, waiting included.

        Raises:
            TypeError: `texts` is one str, or holds something that is not a str.
            ValueError: `texts` is empty, or holds an empty text. Nothing was sent.
            AllFailedError: Not one text was embedded; `.result` tells why.
            FatalProviderError: Going on is pointless (wrong key, no quota, unknown model, an outage);
                `.result` holds what was done.
            DeadlineError: The deadline passed; `.result` holds what was done. Nothing is left running.
        """
        contents = listed(texts)
        run = Run(deadline)
        results = Results(len(contents), run, on_progress)
        async with run.until_deadline():
            waiting = await checked(contents)
            await self._send(waiting, run, results.deliver)
        result = results.finish(self.dimensions, self.cost_usd(run), run.stopped_by)
        if run.stopped_by is not None:
            run.stopped_by.result = result
            raise run.stopped_by
        if len(result.failures) == len(result):
            raise failed(result)
        return result

    async def embed_one(self, text: str, *, deadline: float | None = None) -> Vectors:
        """Return the vector float32[d] of one text. Concurrent calls share requests, equal texts one input.

        A lone call is sent at once; what is asked for while two shared requests are under way travels together.
        Cancelling one call harms no other.

        Args:
            text: Not empty.
            deadline: Seconds for this call, waiting included.

        Raises:
            DeadlineError: The deadline passed.
            AsyncEmbedError: Why this text failed; an object of this call's own.
        """
        try:
            check_text(text)
        except InputError as error:
            raise type(error)(f"text {error}") from None
        run = Run(deadline)
        async with run.until_deadline():
            vector = await self._coalescers.get().get(text)
        if run.stopped_by is not None:
            raise run.stopped_by
        return vector

    async def stream(
        self, records: AnyIterable, *, deadline: float | None = None
    ) -> AsyncGenerator[EmbeddedRecord, None]:
        """Yield each record with its vector or its error, in order, while the source is still being read.

        Memory is bounded by what is under way: the source is read only so far ahead. Leaving the loop early ends
        the requests under way; `async with contextlib.aclosing(...)` does so at once.

        Args:
            records: Any sync or async iterable of records, in all their forms, or of plain texts, whose id is
                then their position.
            deadline: Seconds for the whole stream, waiting included.

        Raises:
            FatalProviderError: Going on is pointless. What was done has been yielded.
            DeadlineError: The deadline passed; likewise.
            Exception: What the source raised, as it is; likewise.
        """
        run = Run(deadline)
        order = Order(most_ahead=(self.concurrency + 1) * self._limits.inputs)
        running = asyncio.create_task(self._feed(order, records, run))
        running.add_done_callback(lambda _: order.end())
        try:
            async for item in order.items():
                yield item
            await running
        finally:
            await ended(running)
        if run.stopped_by is not None:
            raise run.stopped_by

    async def _feed(self, order: Order, records: AnyIterable, run: Run) -> None:
        async with run.until_deadline(), aclosing(order.slices(records)) as slices:
            await self._engines.get().run(slices, await self._counter(), run, order.deliver, open_batches=1)

    async def plan(self, texts: AnyIterable) -> Plan:
        """Return what embedding the texts would take. Sends nothing.

        Args:
            texts: Any sync or async iterable of texts, or of records in all their forms.
        """
        counter = await self._counter()
        packer: Packer[None] = Packer(self._limits.inputs, self._limits.tokens)
        inputs = requests = tokens = count = 0
        failures: list[Failure] = []
        async with aclosing(in_slices(texts)) as slices:
            async for some in slices:
                read = list(readable(count, some))
                count += len(some)
                failures.extend(Failure(index, error) for index, _, error in read if error is not None)
                waiting = unique((index, record.text) for index, record, error in read if error is None)
                for part in portions(waiting):
                    items, bad = await asyncio.to_thread(weigh_texts, part, counter, self._limits, self._too_long)
                    failures.extend(Failure(index, error) for text, error in bad for index in text.indices)
                    requests += sum(packer.add(None, item.weight) is not None for item in items)
                    tokens += sum(item.tokens for item in items)
                    inputs += len(part) - len(bad)
        requests += len(packer.flush())
        return Plan(
            texts=inputs,
            failures=tuple(sorted(failures, key=lambda failure: failure.index)),
            requests=requests,
            tokens=tokens,
            exact=counter.exact,
            seconds=self._seconds(requests, tokens),
            cost_usd=self._price(tokens),
        )

    # ---- what `pipeline` builds on ----

    async def run(self, slices: AsyncIterator[Sequence[Text]], run: Run, deliver: Deliver) -> None:
        """Embed slices of texts and deliver outcomes while their slot is held; see `Engine.run`."""
        await self._engines.get().run(slices, await self._counter(), run, deliver)

    def cost_usd(self, run: Run) -> float | None:
        """The list price of what a run was billed; None if price or count is unknown."""
        return self._price(run.tokens) if run.tokens_known else None

    def _price(self, tokens: int) -> float | None:
        price = self._facts.usd_per_million_tokens
        return None if price is None else tokens * price / 1_000_000

    def _seconds(self, requests: int, tokens: int) -> float | None:
        amounts = zip((requests, tokens), self._per_minute, strict=True)
        return max((amount / per_minute * 60 for amount, per_minute in amounts if per_minute), default=None)

    def _new_engine(self) -> Engine:
        # The provider counts limits per address, key and model; a provider of the user's own is its own place.
        place = getattr(self._provider, "identity", None) or id(self._provider)
        pace = shared_pace((place, self.model))
        pace.limit(*self._per_minute)
        return Engine(
            self._provider,
            Slots(pace, self.concurrency),
            self._limits,
            concurrency=self.concurrency,
            too_long=self._too_long,
            max_retries=self._max_retries,
        )

    async def _send(self, texts: list[Text], run: Run, deliver: Deliver) -> None:
        counter = await self._counter_for(texts)
        async with aclosing(_once(texts)) as slices:
            await self._engines.get().run(slices, counter, run, deliver)

    async def _counter(self) -> TokenCounter:
        if isinstance(self._provider, LocalProvider):
            return LocalCounter()
        return await load_counter(self._facts.encoding)

    async def _counter_for(self, texts: Sequence[Text]) -> TokenCounter:
        # No text has more tokens than bytes, and no character more than four bytes: what is surely short enough
        # for one text and, all together, for one request, needs no tokenizer.
        characters = self._limits.tokens // 4
        if len(texts) <= characters and sum(len(text.content) for text in texts) <= characters:
            longest = max(len(text.content) for text in texts)
            if 4 * longest <= self._limits.tokens_per_text:
                return ByteBound()
        return await self._counter()


async def _once(texts: Sequence[Text]) -> AsyncGenerator[Sequence[Text], None]:
    yield texts
