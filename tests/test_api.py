"""The public imports: which names exist, what importing them loads, and that no name hides a module."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import asyncembed

# Users import these, so none may disappear or move. Written out here so that a deleted name fails.
PUBLIC = {
    "asyncembed": """
        AllFailedError AsyncEmbedError AuthenticationError BadRequestError Cache CertificateError Check
        ConfigError DeadlineError EmbeddedRecord Embedder EmbeddingResult Failure FatalProviderError Hit
        IngestReport InputError InvalidRecordError InvalidTextError MemoryCache NotFoundError Observer
        OverloadedError PermissionDeniedError Plan PostgresSink PostgresSource Progress ProtocolError Provider
        ProviderDownError ProviderError QuotaError RateLimitedError Record RedirectRefusedError
        RejectedTextError Reply RequestError Row RowRefusedError SQLiteCache SQLiteSink ServerError Sink
        SinkBusyError SinkConfigError SinkError SomeFailedError SourceError Stats TooLargeError TooLongError
        TransportError WrongTypeError ingest open_sink
    """,
    "asyncembed.caches": "MemoryCache",
    "asyncembed.errors": "AsyncEmbedError QuotaError ServerError SinkBusyError",
    "asyncembed.metrics": "Observer RequestFinished RequestStarted Stats",
    "asyncembed.otel": "OpenTelemetry",
    "asyncembed.sinks": "PostgresSink SQLiteSink open_sink",
    "asyncembed.sources": "PostgresSource Sources",
    "asyncembed.testing": """
        AZURE AZURE_INFERENCE Beside BrokenGzip CutBody DASHSCOPE DIALECTS Dialect Disconnect Drip
        DuplicateIndex EmbeddingServer ErrorBody200 FASTAPI Fault Float64 Flood Forbidden ForeignVector
        Garbage GzipBomb HTMLError Hang HugeHeader Interim InvalidInput InvalidKey LM_STUDIO Late
        LoggedRequest MissingIndex NaNVector NotHTTP OLD_VLLM OPENAI OPENAI_2026 OtherEncoding Overloaded
        PASSING QuotaExceeded RateLimited Redirect Reset Schedule ServerError ServerFault Shuffled SlowDown
        Stalls Status TEI TooManyTokens TruncatedJSON UnsupportedValue Wording WrongCount WrongDimensions
        embedding_of every first_of mixed outage poison script watch_loop
    """,
    "asyncembed.types": "Cache EmbeddedRecord Failure Hit PrunableSink Provider Record Reply Row Sink Vectors",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_import_works_in_a_new_process(module: str) -> None:
    code = f"from {module} import {', '.join(PUBLIC[module].split())}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


def test_all_lists_every_public_name_in_order() -> None:
    assert asyncembed.__all__ == sorted(asyncembed.__all__)
    assert set(asyncembed.__all__) == set(PUBLIC["asyncembed"].split())
    for name in asyncembed.__all__:
        assert getattr(asyncembed, name).__doc__, name
    ours = {name: value for name, value in vars(asyncembed).items() if isinstance(value, type)}
    public = {name for name, value in ours.items() if value.__module__.startswith("asyncembed")}
    assert public <= set(asyncembed.__all__)


def test_every_error_is_public() -> None:
    errors = importlib.import_module("asyncembed.errors")
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, asyncembed.AsyncEmbedError)
    }
    assert found <= set(asyncembed.__all__)


def test_no_export_hides_a_module() -> None:
    modules = {module.name for module in pkgutil.iter_modules(asyncembed.__path__)}
    assert modules.isdisjoint(asyncembed.__all__)


def test_importing_the_package_loads_no_dependency_and_still_lists_its_names() -> None:
    code = """
import sys, asyncembed
assert "numpy" not in sys.modules
assert set(asyncembed.__all__) <= set(dir(asyncembed))
from asyncembed import AsyncEmbedError, TransportError
assert issubclass(TransportError, AsyncEmbedError)
assert "numpy" not in sys.modules
from asyncembed import *
assert Embedder is asyncembed.Embedder is asyncembed.embedder.Embedder
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("driver", ["openai", "httpx2", "tiktoken", "toktok", "asyncpg", "wordllama", "click", "rich"])
def test_importing_the_package_loads_no_driver(driver: str) -> None:
    code = f"import sys, asyncembed; asyncembed.Embedder; sys.exit({driver!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_modules_are_attributes_without_an_import_of_their_own() -> None:
    code = """
import asyncembed
for name in ("caches", "embedder", "errors", "metrics", "pipeline", "report", "sinks", "sources", "types"):
    assert getattr(asyncembed, name).__name__ == f"asyncembed.{name}"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Nothing"):
        asyncembed.Nothing  # noqa: B018  # the access is what is tested
