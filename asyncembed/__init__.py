"""asyncembed: an asyncio-native embedding client.

    async with Embedder("text-embedding-3-small") as embedder:
        result = await embedder.embed(texts)

Importing this loads nothing else: each part is loaded at first use, and each driver when its part first needs it.
"""

# ruff: noqa: F405
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .caches import MemoryCache
    from .caches.sqlite import SQLiteCache
    from .embedder.embedder import Embedder
    from .errors import *  # noqa: F403  # every error is public
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


# The modules of these names; all others are in `errors`. Each is loaded at first use: a program starts 80 ms sooner,
# and one that needs only the errors does not load numpy.
_MODULES = {
    "caches": "MemoryCache",
    "caches.sqlite": "SQLiteCache",
    "embedder": "Embedder",
    "metrics": "Observer Stats",
    "pipeline": "ingest",
    "report": "Check EmbeddingResult IngestReport Plan Progress",
    "sinks": "PostgresSink SQLiteSink open_sink",
    "sources": "PostgresSource",
    "types": "Cache EmbeddedRecord Failure Hit Provider Record Reply Row Sink",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in __all__:
        globals()[name] = getattr(import_module(f".{_MODULE_OF.get(name, 'errors')}", __name__), name)
        return globals()[name]
    if name in {"errors", *_MODULES}:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
