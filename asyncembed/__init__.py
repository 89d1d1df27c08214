"""asyncembed: an asyncio-native embedding client.

    async with Embedder("text-embedding-3-small") as embedder:
        result = await embedder.embed(texts)

Importing this loads no driver: each is loaded when it is first needed.
"""

from typing import TYPE_CHECKING, Any

from .caches import MemoryCache
from .embedder import Embedder
from .errors import (
    AllFailedError,
    AsyncEmbedError,
    AuthenticationError,
    BadRequestError,
    CertificateError,
    ConfigError,
    DeadlineError,
    FatalProviderError,
    InputError,
    InvalidRecordError,
    InvalidTextError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    ProviderDownError,
    ProviderError,
    QuotaError,
    RateLimitedError,
    RedirectRefusedError,
    RejectedTextError,
    RequestError,
    RowRefusedError,
    ServerError,
    SinkBusyError,
    SinkConfigError,
    SinkError,
    SomeFailedError,
    SourceError,
    TooLargeError,
    TooLongError,
    TransportError,
    WrongTypeError,
)
from .metrics import Observer, Stats
from .pipeline import ingest
from .report import Check, EmbeddingResult, IngestReport, Plan, Progress
from .sinks import open_sink
from .types import Cache, EmbeddedRecord, Failure, Hit, Provider, Record, Reply, Row, Sink

if TYPE_CHECKING:
    from .caches.sqlite import SQLiteCache
    from .sinks import PostgresSink, SQLiteSink
    from .sources import PostgresSource

__version__ = "0.1.0"

__all__ = [
    "AllFailedError",
    "AsyncEmbedError",
    "AuthenticationError",
    "BadRequestError",
    "Cache",
    "CertificateError",
    "Check",
    "ConfigError",
    "DeadlineError",
    "EmbeddedRecord",
    "Embedder",
    "EmbeddingResult",
    "Failure",
    "FatalProviderError",
    "Hit",
    "IngestReport",
    "InputError",
    "InvalidRecordError",
    "InvalidTextError",
    "MemoryCache",
    "NotFoundError",
    "Observer",
    "OverloadedError",
    "PermissionDeniedError",
    "Plan",
    "PostgresSink",
    "PostgresSource",
    "Progress",
    "ProtocolError",
    "Provider",
    "ProviderDownError",
    "ProviderError",
    "QuotaError",
    "RateLimitedError",
    "Record",
    "RedirectRefusedError",
    "RejectedTextError",
    "Reply",
    "RequestError",
    "Row",
    "RowRefusedError",
    "SQLiteCache",
    "SQLiteSink",
    "ServerError",
    "Sink",
    "SinkBusyError",
    "SinkConfigError",
    "SinkError",
    "SomeFailedError",
    "SourceError",
    "Stats",
    "TooLargeError",
    "TooLongError",
    "TransportError",
    "WrongTypeError",
    "ingest",
    "open_sink",
]


def __getattr__(name: str) -> Any:
    if name in ("PostgresSink", "SQLiteSink"):  # their drivers load when they are asked for
        from . import sinks

        return getattr(sinks, name)
    if name == "SQLiteCache":
        from .caches.sqlite import SQLiteCache

        return SQLiteCache
    if name == "PostgresSource":
        from . import sources

        return sources.PostgresSource
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
