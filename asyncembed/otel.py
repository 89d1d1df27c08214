"""Spans and metrics for OpenTelemetry. The only module that imports `opentelemetry` (extra `otel`).

    embedder = Embedder("text-embedding-3-small", observer=OpenTelemetry())

Names follow the semantic conventions for generative AI of OpenTelemetry 1.41 (status: development), the last version
before they moved to their own repository. Names that the conventions lack start with `asyncembed.`.

A span is one HTTP request, so a retry is a span. Its parent is the span in which `embed`, `stream` or `ingest` was
called. A request that several small calls share starts a new trace, with a link to the span of each caller; if all
calls were made in one span, that span is its parent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from . import __version__
from .errors import ConfigError
from .metrics import RequestFinished, RequestStarted

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Link, TracerProvider

Attributes: TypeAlias = dict[str, str | int | float | bool | Sequence[str]]

SCHEMA_URL = "https://opentelemetry.io/schemas/1.41.0"

# The buckets of the conventions, docs/gen-ai/gen-ai-metrics.md, read 2026-11.
DURATION_BUCKETS = tuple(0.01 * 2**power for power in range(14))
TOKEN_BUCKETS = tuple(4**power for power in range(14))

# Our own buckets. Waits last from one iteration of the event loop to a provider's window of a minute and more.
WAIT_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
FILL_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1)

# `gen_ai.provider.name` in the conventions' list, by the end of the host's name.
PROVIDERS = {
    "api.openai.com": "openai",
    ".openai.azure.com": "azure.ai.openai",
    ".cognitiveservices.azure.com": "azure.ai.openai",
    ".models.ai.azure.com": "azure.ai.inference",
    "api.cohere.com": "cohere",
    "api.mistral.ai": "mistral_ai",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
}

MOST_LINKS = 128  # the SDK's default for OTEL_SPAN_LINK_COUNT_LIMIT: it would drop further links


class OpenTelemetry:
    """An observer that makes spans and metrics. Several embedders can share one.

    Args:
        tracer_provider: None for the global one.
        meter_provider: None for the global one.

    Raises:
        ConfigError: The extra `otel` is not installed.
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        try:
            self._context = importlib.import_module("opentelemetry.context")
            self._trace = importlib.import_module("opentelemetry.trace")
            metrics = importlib.import_module("opentelemetry.metrics")
        except ImportError:
            raise ConfigError('OpenTelemetry is not installed: pip install "asyncembed[otel]"') from None
        self._tracer = self._trace.get_tracer("asyncembed", __version__, tracer_provider, SCHEMA_URL)
        meter = metrics.get_meter("asyncembed", __version__, meter_provider, SCHEMA_URL)

        def histogram(name: str, unit: str, description: str, buckets: Sequence[float]) -> Any:
            return meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=buckets).record

        self._duration = histogram(
            "gen_ai.client.operation.duration", "s", "GenAI operation duration.", DURATION_BUCKETS
        )
        self._tokens = histogram(
            "gen_ai.client.token.usage", "{token}", "Number of input and output tokens used.", TOKEN_BUCKETS
        )
        self._fill = histogram(
            "asyncembed.batch.fill", "1", "Used part of a request's limit of inputs or tokens.", FILL_BUCKETS
        )
        self._wait = histogram("asyncembed.wait.duration", "s", "Wait of a request before it was sent.", WAIT_BUCKETS)
        self._queue = histogram(
            "asyncembed.queue.duration", "s", "Wait of a call until its shared request was sent.", WAIT_BUCKETS
        )
        self._retries = meter.create_counter("asyncembed.request.retries", "{request}", "Requests that were retries.")
        self._pauses = meter.create_counter("asyncembed.pauses", "{pause}", "Pauses that the provider requested.")
        self._lookups = meter.create_counter("asyncembed.cache.lookups", "{text}", "Texts looked up in the cache.")

    def caller(self) -> object:
        """Return the caller's context. A shared request links to the span in it."""
        return self._context.get_current()

    def request(self, started: RequestStarted, /) -> Callable[[RequestFinished], None]:
        """Start the span of a request and make it the current one; the returned function ends it."""
        common = common_attributes(started)
        context, links = self._relatives(started.callers)
        kind = self._trace.SpanKind.INTERNAL if started.address is None else self._trace.SpanKind.CLIENT
        own: Attributes = {
            "asyncembed.batch.inputs": started.inputs,
            "asyncembed.batch.fill": round(started.fill, 4),
            "asyncembed.request.is_retry": started.is_retry,
        }
        span = self._tracer.start_span(
            f"embeddings {started.model}", context, kind, attributes={**common, **own}, links=links
        )
        self._fill(started.fill, common)
        self._wait(started.held_s, {**common, "asyncembed.wait.reason": "rate"})
        self._wait(started.waited_s - started.held_s, {**common, "asyncembed.wait.reason": "turn"})
        if started.is_retry:
            self._retries.add(1, common)
        token = self._context.attach(self._trace.set_span_in_context(span, context))

        def finish(finished: RequestFinished) -> None:
            self._context.detach(token)
            span.set_attributes(response_attributes(finished))
            if finished.error is not None and finished.error != "CancelledError":
                span.set_status(self._trace.StatusCode.ERROR)
            response = common if finished.model is None else {**common, "gen_ai.response.model": finished.model}
            if finished.tokens is not None:
                self._tokens(finished.tokens, {**response, "gen_ai.token.type": "input"})
            failed = {} if finished.error is None else {"error.type": finished.error}
            self._duration(finished.elapsed_s, {**response, **failed})
            span.end()

        return finish

    def queued(self, model: str, seconds: float, /) -> None:
        """Record how long a call waited for its shared request."""
        self._queue(seconds, {"gen_ai.request.model": model})

    def paused(self, model: str, seconds: float, everybody: bool, /) -> None:
        """Count a pause of all requests, or record how long one batch backs off."""
        if everybody:
            self._pauses.add(1, {"gen_ai.request.model": model})
        else:
            self._wait(seconds, {"gen_ai.request.model": model, "asyncembed.wait.reason": "backoff"})

    def cached(self, model: str, hits: int, misses: int, /) -> None:
        """Count cache hits and misses."""
        for count, result in ((hits, "hit"), (misses, "miss")):
            if count:
                self._lookups.add(count, {"gen_ai.request.model": model, "asyncembed.cache.result": result})

    def _relatives(self, callers: Sequence[object] | None) -> tuple[Context | None, list[Link]]:
        """Return the context with the parent span, None for the current one; and links to other spans."""
        if callers is None:
            return None, []
        different = {id(caller): caller for caller in callers}
        spans: dict[int, tuple[Context, Link]] = {}
        for caller in islice(different.values(), MOST_LINKS):
            span_context = self._trace.get_current_span(caller).get_span_context()
            if span_context.is_valid:
                spans[span_context.span_id] = caller, self._trace.Link(span_context)  # type: ignore[assignment]
        if len(spans) == 1:
            [(parent, _)] = spans.values()
            return parent, []
        return self._context.Context(), [link for _, link in spans.values()]


def common_attributes(started: RequestStarted) -> Attributes:
    """Return the attributes of a request's span and metrics. A sampler can use them: they are known at the start."""
    attributes: Attributes = {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": provider_name(started.address),
        "gen_ai.request.model": started.model,
    }
    if started.address is not None:
        attributes["server.address"], attributes["server.port"] = started.address
    return attributes


def response_attributes(finished: RequestFinished) -> Attributes:
    """Return a span's attributes for the response. `error.type` is the name of a class in `errors`."""
    known: Mapping[str, str | int | list[str] | None] = {
        "gen_ai.response.model": finished.model,
        "gen_ai.usage.input_tokens": finished.tokens,
        "gen_ai.embeddings.dimension.count": finished.dimensions,
        "gen_ai.request.encoding_formats": [finished.encoding] if finished.encoding else None,
        "http.response.status_code": finished.status,
        "error.type": finished.error,
    }
    return {name: value for name, value in known.items() if value is not None}


def provider_name(address: tuple[str, int] | None) -> str:
    """Return the conventions' name for a known host, otherwise the host's name; "_OTHER" without an address."""
    if address is None:
        return "_OTHER"
    host = address[0].lower()
    return next((name for end, name in PROVIDERS.items() if host.endswith(end)), host)
