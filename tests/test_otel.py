"""`otel` with the real SDK and a real server: spans and metrics follow the conventions and hold no text."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asyncembed import Embedder
from asyncembed.errors import AuthenticationError, ConfigError
from asyncembed.otel import DURATION_BUCKETS, MOST_LINKS, TOKEN_BUCKETS, OpenTelemetry, provider_name
from asyncembed.providers.openai import OpenAIProvider
from asyncembed.testing import OLD_VLLM, EmbeddingServer, InvalidKey, RateLimited, ServerError
from tests.fakes import FakeProvider

KEY = "sk-proj-a-key-that-nobody-may-see"
SECRET = "what nobody may read"
MODEL = "text-embedding-3-small"


class Exported:
    """An observer, and everything that it exported."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.tracer = tracers.get_tracer("the application")
        self.observer = OpenTelemetry(tracers, MeterProvider([self._metrics], shutdown_on_exit=False))

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans of requests, in the order of their ends."""
        return [span for span in self._spans.get_finished_spans() if span.name.startswith("embeddings ")]

    def named(self, name: str) -> ReadableSpan:
        [span] = [span for span in self._spans.get_finished_spans() if span.name == name]
        return span

    def points(self) -> dict[str, list[Any]]:
        """The data points of each metric."""
        data = self._metrics.get_metrics_data()
        return {
            metric.name: list(metric.data.data_points)
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def everything(self) -> str:
        data = self._metrics.get_metrics_data()
        return "".join(span.to_json() for span in self._spans.get_finished_spans()) + (data.to_json() if data else "")


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


def one(points: list[Any], **wanted: str) -> Any:
    names = {name.replace("__", "."): value for name, value in wanted.items()}
    [point] = [point for point in points if names.items() <= point.attributes.items()]
    return point


async def test_a_refusal_a_failure_and_a_success_have_one_span_each() -> None:
    exported = Exported()
    faults = [RateLimited(headers={"retry-after-ms": "10"}), ServerError()]
    async with (
        EmbeddingServer(faults=faults) as server,
        Embedder(MODEL, base_url=server.base_url, api_key=KEY, observer=exported.observer) as embedder,
    ):
        result = await embedder.embed([f"{SECRET} {number}" for number in range(40)])
        stats = embedder.stats()

    refused, failed, succeeded = exported.spans
    port = int(server.base_url.split(":")[2].split("/")[0])
    for span in exported.spans:
        assert span.name == f"embeddings {MODEL}"
        assert span.kind is trace.SpanKind.CLIENT
        found = attributes(span)
        assert found["gen_ai.operation.name"] == "embeddings"
        assert found["gen_ai.provider.name"] == found["server.address"] == "127.0.0.1"
        assert found["gen_ai.request.model"] == MODEL
        assert found["gen_ai.request.encoding_formats"] == ("base64",)
        assert found["server.port"] == port
        assert found["asyncembed.batch.inputs"] == 40
    for span, error, status in ((refused, "RateLimitedError", 429), (failed, "ServerError", 500)):
        assert attributes(span)["error.type"] == error
        assert attributes(span)["http.response.status_code"] == status
        assert span.status.status_code is trace.StatusCode.ERROR
        assert span.status.description is None
        assert "gen_ai.usage.input_tokens" not in attributes(span)
    assert succeeded.status.status_code is trace.StatusCode.UNSET
    assert "error.type" not in attributes(succeeded)
    assert attributes(succeeded)["gen_ai.usage.input_tokens"] == result.total_tokens == stats.tokens
    assert attributes(succeeded)["gen_ai.response.model"] == MODEL
    assert attributes(succeeded)["gen_ai.embeddings.dimension.count"] == 1_536
    assert [attributes(span)["asyncembed.request.is_retry"] for span in exported.spans] == [False, True, True]
    assert (stats.requests, stats.refusals) == (3, 1)
    assert SECRET not in exported.everything()
    assert KEY not in exported.everything()


async def test_a_wrong_key_is_the_error_type_of_the_span_and_the_key_is_not_exported() -> None:
    exported = Exported()
    async with (
        EmbeddingServer(faults=[InvalidKey()]) as server,
        Embedder(MODEL, base_url=server.base_url, api_key=KEY, observer=exported.observer) as embedder,
    ):
        with pytest.raises(AuthenticationError):
            await embedder.embed([SECRET] * 40)

    [span] = exported.spans
    assert attributes(span)["error.type"] == "AuthenticationError"
    assert attributes(span)["http.response.status_code"] == 401
    assert KEY not in exported.everything()


async def test_the_encoding_is_the_one_that_the_server_accepted() -> None:
    exported = Exported()
    async with (
        EmbeddingServer(dialect=OLD_VLLM) as server,
        Embedder(MODEL, base_url=server.base_url, api_key=KEY, observer=exported.observer) as embedder,
    ):
        await embedder.embed_one("a")
    assert attributes(exported.spans[0])["gen_ai.request.encoding_formats"] == ("float",)


async def test_metrics_follow_the_conventions_and_agree_with_the_result() -> None:
    exported = Exported()
    async with (
        EmbeddingServer(faults=[RateLimited(headers={"retry-after-ms": "50"}), ServerError()]) as server,
        Embedder(
            MODEL, base_url=server.base_url, api_key=KEY, observer=exported.observer, max_batch_size=100, concurrency=1
        ) as embedder,
    ):
        result = await embedder.embed([f"text {number}" for number in range(150)])
        await embedder.embed_one("another")
        stats = embedder.stats()

    points = exported.points()
    durations = points["gen_ai.client.operation.duration"]
    assert sum(point.count for point in durations) == stats.requests == result.requests + 1 == 5
    assert sum(point.sum for point in durations) == pytest.approx(stats.request_s)
    assert one(durations, error__type="RateLimitedError").count == 1
    assert one(durations, error__type="ServerError").count == 1
    assert one(durations, gen_ai__response__model=MODEL).count == 3
    assert durations[0].explicit_bounds == pytest.approx(DURATION_BUCKETS)
    [tokens] = points["gen_ai.client.token.usage"]
    assert tokens.sum == stats.tokens == server.total_tokens
    assert tokens.attributes["gen_ai.token.type"] == "input"
    assert tokens.explicit_bounds == TOKEN_BUCKETS
    [retries] = points["asyncembed.request.retries"]
    assert retries.value == stats.retries == result.retries == 2
    [fill] = points["asyncembed.batch.fill"]
    assert fill.sum == pytest.approx(stats.filled)
    held = one(points["asyncembed.wait.duration"], asyncembed__wait__reason="rate")
    turn = one(points["asyncembed.wait.duration"], asyncembed__wait__reason="turn")
    backoff = one(points["asyncembed.wait.duration"], asyncembed__wait__reason="backoff")
    assert held.sum == pytest.approx(stats.held_s)
    assert held.sum > 0
    assert turn.sum == pytest.approx(stats.waited_s - stats.held_s)
    assert backoff.sum == pytest.approx(stats.backoff_s)
    [pauses] = points["asyncembed.pauses"]
    assert pauses.value == stats.pauses == 1
    [queue] = points["asyncembed.queue.duration"]
    assert (queue.count, queue.sum) == (1, pytest.approx(stats.queue_s))


def test_the_buckets_are_those_of_the_conventions() -> None:
    # gen-ai-metrics.md, copied
    assert pytest.approx(DURATION_BUCKETS) == [
        0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    ]  # fmt: skip
    assert list(TOKEN_BUCKETS) == [
        1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864,
    ]  # fmt: skip


async def test_cache_lookups_are_counted_by_their_result() -> None:
    exported = Exported()
    exported.observer.cached(MODEL, 1, 0)
    assert len(exported.points()["asyncembed.cache.lookups"]) == 1
    exported.observer.cached(MODEL, 3, 2)

    lookups = exported.points()["asyncembed.cache.lookups"]
    assert one(lookups, asyncembed__cache__result="hit").value == 4
    assert one(lookups, asyncembed__cache__result="miss").value == 2


# ---- parents and links


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent and span.parent.span_id


@pytest.mark.virtual_time
async def test_requests_of_a_bulk_call_are_children_of_the_callers_span() -> None:
    exported = Exported()
    embedder = Embedder(
        "fake", provider=FakeProvider(), observer=exported.observer, max_batch_size=40, concurrency=1
    )  # one task sends several, one after the other
    with exported.tracer.start_as_current_span("job"):
        await embedder.embed([f"text {number}" for number in range(100)])
    with exported.tracer.start_as_current_span("stream"):
        async for _ in embedder.stream([f"text {number}" for number in range(40)]):
            pass

    parents = [parent_of(span) for span in exported.spans]
    assert parents == [*[exported.named("job").context.span_id] * 3, exported.named("stream").context.span_id]


async def embed_in_spans(embedder: Embedder, exported: Exported, *names: str) -> None:
    """Embed one text in a span of each name, all at once."""

    async def ask(name: str) -> None:
        with exported.tracer.start_as_current_span(name):
            await embedder.embed_one(f"for {name}")

    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(ask(name))


@pytest.mark.virtual_time
async def test_a_request_for_one_caller_is_a_child_of_its_span() -> None:
    exported = Exported()
    embedder = Embedder("fake", provider=FakeProvider(), observer=exported.observer)
    await embed_in_spans(embedder, exported, "alone")

    [span] = exported.spans
    assert parent_of(span) == exported.named("alone").context.span_id
    assert not span.links


@pytest.mark.virtual_time
async def test_a_shared_request_starts_a_trace_with_links_to_its_callers() -> None:
    exported = Exported()
    embedder = Embedder("fake", provider=FakeProvider(), observer=exported.observer)
    await embed_in_spans(embedder, exported, "one", "two", "three")

    [span] = exported.spans
    assert span.parent is None
    callers = [exported.named(name).context.span_id for name in ("one", "two", "three")]
    assert [link.context.span_id for link in span.links] == callers
    assert span.context.trace_id not in {link.context.trace_id for link in span.links}


@pytest.mark.virtual_time
async def test_a_request_shared_by_calls_in_one_span_is_its_child() -> None:
    exported = Exported()
    embedder = Embedder("fake", provider=FakeProvider(), observer=exported.observer)
    with exported.tracer.start_as_current_span("handler"):
        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(embedder.embed_one(f"text {number}"))

    [span] = exported.spans
    assert parent_of(span) == exported.named("handler").context.span_id


@pytest.mark.virtual_time
async def test_callers_outside_of_a_span_do_not_count() -> None:
    exported = Exported()
    embedder = Embedder("fake", provider=FakeProvider(), observer=exported.observer)
    async with asyncio.TaskGroup() as group:
        group.create_task(embedder.embed_one("in no span"))
        with exported.tracer.start_as_current_span("alone"):
            group.create_task(embedder.embed_one("in one"))

    [span] = exported.spans
    assert parent_of(span) == exported.named("alone").context.span_id


@pytest.mark.virtual_time
async def test_a_request_is_not_a_child_of_the_previous_caller() -> None:
    # a shared request is sent from a callback of the previous request, and so in the context of its caller
    exported = Exported()
    embedder = Embedder("fake", provider=FakeProvider(), observer=exported.observer)

    async def ask(name: str) -> None:
        with exported.tracer.start_as_current_span(name):
            await embedder.embed_one(name)

    async with asyncio.TaskGroup() as group:
        for name in ("one", "two", "three"):
            group.create_task(ask(name))
            await asyncio.sleep(0.1)

    parents = [parent_of(span) for span in exported.spans]
    assert parents == [exported.named(name).context.span_id for name in ("one", "two", "three")]


@pytest.mark.virtual_time
async def test_there_are_no_more_links_than_the_sdk_keeps() -> None:
    exported = Exported()
    embedder = Embedder("fake", provider=FakeProvider(), observer=exported.observer)
    await embed_in_spans(embedder, exported, *(f"caller {number}" for number in range(MOST_LINKS + 50)))

    [span] = exported.spans
    assert len(span.links) == MOST_LINKS


@pytest.mark.virtual_time
async def test_calls_outside_of_any_span_share_a_new_trace() -> None:
    exported = Exported()
    embedder = Embedder("fake", provider=FakeProvider(), observer=exported.observer)
    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(embedder.embed_one(f"text {number}"))

    [span] = exported.spans
    assert span.parent is None
    assert not span.links
    assert span.kind is trace.SpanKind.INTERNAL  # there is no server
    assert attributes(span)["gen_ai.provider.name"] == "_OTHER"


@pytest.mark.virtual_time
async def test_the_span_of_a_request_is_current_while_it_is_sent() -> None:
    exported = Exported()
    seen: list[int] = []

    class Looking(FakeProvider):
        async def embed(self, texts: Any) -> Any:
            seen.append(trace.get_current_span().get_span_context().span_id)
            return await super().embed(texts)

    embedder = Embedder("fake", provider=Looking(), observer=exported.observer)
    with exported.tracer.start_as_current_span("job") as job:
        await embedder.embed(["a"])
        assert trace.get_current_span() is job

    assert seen == [exported.spans[0].context.span_id]


@pytest.mark.virtual_time
async def test_a_cancelled_request_ends_its_span_without_an_error_status() -> None:
    exported = Exported()
    embedder = Embedder("fake", provider=FakeProvider(), observer=exported.observer)
    running = asyncio.create_task(embedder.embed_one("a"))
    await asyncio.sleep(0.5)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    [span] = exported.spans
    assert attributes(span)["error.type"] == "CancelledError"
    assert span.status.status_code is trace.StatusCode.UNSET


# ---- names


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("api.openai.com", "openai"),
        ("eu.api.openai.com", "openai"),
        ("mine.openai.azure.com", "azure.ai.openai"),
        ("MINE.openai.azure.com", "azure.ai.openai"),
        ("mine.cognitiveservices.azure.com", "azure.ai.openai"),
        ("api.mistral.ai", "mistral_ai"),
        ("generativelanguage.googleapis.com", "gcp.gemini"),
        ("europe-west4-aiplatform.googleapis.com", "gcp.vertex_ai"),
        ("localhost", "localhost"),
        ("embeddings.example.org", "embeddings.example.org"),
    ],
)
def test_a_provider_with_a_known_host_has_the_name_of_the_conventions(host: str, name: str) -> None:
    assert provider_name((host, 443)) == name


@pytest.mark.parametrize(
    ("base_url", "address"),
    [
        ("https://api.openai.com/v1", ("api.openai.com", 443)),
        ("http://localhost:11434/v1", ("localhost", 11434)),
        ("http://127.0.0.1/v1", ("127.0.0.1", 80)),
        ("https://[::1]:8000/v1", ("::1", 8000)),
    ],
)
def test_address_and_port_are_known_even_if_the_url_has_no_port(base_url: str, address: tuple[str, int]) -> None:
    assert OpenAIProvider(MODEL, base_url=base_url, api_key=KEY).info.address == address


def test_importing_the_package_does_not_load_opentelemetry() -> None:
    code = "import sys, asyncembed, asyncembed.otel; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    with pytest.raises(ConfigError, match=r"asyncembed\[otel\]"):
        OpenTelemetry()


async def test_without_an_sdk_nothing_happens() -> None:
    provider = FakeProvider(latency_s=0.0)
    embedder = Embedder("fake", provider=provider, observer=OpenTelemetry())
    assert (await embedder.embed(["a"])).requests == 1
