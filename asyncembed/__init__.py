"""asyncembed: an asyncio-native embedding client.

    async with Embedder("text-embedding-3-small") as embedder:
        result = await embedder.embed(texts)

Importing this loads nothing: each part is loaded when it is first needed, and each driver when that first needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .caches import MemoryCache
    from .caches.sqlite import SQLiteCache
    from .embedder.embedder import Embedder
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
    from .pipeline.ingestion import ingest
    from .report import Check, EmbeddingResult, IngestReport, Plan, Progress
    from .sinks import PostgresSink, SQLiteSink, open_sink
    from .sources import PostgresSource
    from .types import Cache, EmbeddedRecord, Failure, Hit, Provider, Record, Reply, Row, Sink

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


# Where these names live. Each is looked for when it is first asked for: a program starts 80 ms sooner, and one
# that needs nothing but the errors does not load numpy.
_HOMES = ("errors", "types", "report", "metrics", "embedder", "pipeline", "caches", "sinks", "sources", "caches.sqlite")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return import_module(f".{name}", __name__)
    for home in _HOMES if name in __all__ else ():
        module = import_module(f".{home}", __name__)
        if hasattr(module, name):
            globals()[name] = getattr(module, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
