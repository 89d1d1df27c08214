"""The values that users see, the contracts of providers, caches and sinks, and the checks of texts and vectors.

Vectors are `float32[n, d]`, C-contiguous: row i belongs to text i. Texts and metadata are left out of every repr, so
that logging a value by accident shows nothing that was embedded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable
from urllib.parse import urlsplit
from uuid import UUID

import numpy as np
import numpy.typing as npt

from .errors import AsyncEmbedError, InvalidTextError, ProtocolError, WrongTypeError

# ---- values ----

Vectors: TypeAlias = npt.NDArray[np.float32]
"""float32[n, d], or float32[d] for a single vector."""

RecordId: TypeAlias = str | int | UUID
"""Sinks store ids as text: the number 5 and the string "5" are the same id."""


@dataclass(frozen=True, slots=True)
class Record:
    """A text with an id, to be embedded and stored.

    Args:
        id: A str, an int or a UUID, unique in its table.
        text: The text, embedded unchanged.
        metadata: Anything JSON can represent; stored beside the vector.
    """

    id: RecordId
    text: str = field(repr=False)
    metadata: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """A text that was not embedded, or a record that was not stored.

    Attributes:
        index: Its position in the input, counted from 0.
        error: The reason.
        id: The record's id; None in `embed`, and if the record had none.
    """

    index: int
    error: AsyncEmbedError
    id: RecordId | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield index and error, for `for index, error in result.failures`."""
        return iter((self.index, self.error))


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedRecord:
    """One item of `stream`: a record, and either its vector float32[d] or its error."""

    record: Record
    vector: Vectors | None = field(repr=False)
    error: AsyncEmbedError | None = None


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result. `score` is the cosine similarity, from -1 to 1."""

    id: str
    score: float
    text: str | None = field(default=None, repr=False)
    metadata: Mapping[str, Any] | None = field(default=None, repr=False)


# ---- the contract of providers ----


@dataclass(frozen=True, slots=True)
class Rates:
    """The rate limits in a reply's headers; None for missing values.

    `reset_…_s` is the number of seconds until a limit is full again. It is not the time to wait before a request.
    """

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests_s: float | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_s: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """The result of one `Provider.embed`.

    Attributes:
        vectors: float32[n, d], all finite; row i belongs to text i.
        tokens: Tokens billed, as reported by the provider; None if it did not report them.
        rates: The rate limits in the headers; None if there were none.
        model: The model that the provider reports to have used; None if it did not report it.
        requests: HTTP requests sent: more than one if the provider refused the first form of the request.
    """

    vectors: Vectors = field(repr=False)
    tokens: int | None
    rates: Rates | None = None
    model: str | None = None
    requests: int = 1


@dataclass(frozen=True, slots=True)
class ProviderInfo:
    """A provider's description of itself. The defaults apply to a provider without an `info`.

    Attributes:
        base_url: The address that texts are sent to, path included; None if there is none.
        identity: The key by which the provider counts its rate limits, usually its address and a hash of the API key.
            Embedders whose providers have equal identities share one rate limiter. None: the provider object itself.
        dimensions: The size of the vectors; None while it is unknown.
        encoding_format: The format in which vectors are requested; None if the request names none.
        validates: Whether it checks its replies itself: count, size and finite numbers. If not, `Embedder` does.
    """

    base_url: str | None = None
    identity: Hashable = None
    dimensions: int | None = None
    encoding_format: str | None = None
    validates: bool = False

    @property
    def host(self) -> str | None:
        """Host and port, without user and password."""
        return urlsplit(self.base_url).netloc.rpartition("@")[2] if self.base_url else None

    @property
    def address(self) -> tuple[str, int] | None:
        """The server's name and port."""
        if not self.base_url:
            return None
        parts = urlsplit(self.base_url)
        return parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


class Provider(Protocol):
    """Sends requests to one embedding service. Safe to call from many tasks at once."""

    async def embed(self, texts: Sequence[str]) -> Reply:
        """Send one request and return its validated reply.

        Raises:
            ProviderError: The request failed; no vector of its reply is used.
        """
        ...

    async def aclose(self) -> None:
        """Close what the provider has opened itself. A client that was passed in stays open."""
        ...


@runtime_checkable
class DescribedProvider(Provider, Protocol):
    """A provider that describes itself."""

    @property
    def info(self) -> ProviderInfo:
        """The description as far as it is known; the first reply may add to it."""
        ...


def info_of(provider: Provider) -> ProviderInfo:
    """Return a provider's description of itself, or the defaults."""
    return provider.info if isinstance(provider, DescribedProvider) else ProviderInfo()


# ---- the contract of caches ----


class Cache(Protocol):
    """Stores vectors by a hash of the text and of everything else that determines them. Safe to call from many tasks.

    An error of a cache fails no call: it is logged once and counts as a miss. The exception is a `ConfigError`, which
    means that the cache can never work. Callers wait for `get`, so it needs its own timeout.
    """

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        """Return the stored vectors, each float32[d], by key. A key has 32 bytes. The caller does not alter them."""
        ...

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        """Store copies of the vectors, each float32[d]: each of them is a view of a larger array."""
        ...

    async def aclose(self) -> None:
        """Close what the cache has opened."""
        ...


# ---- the contract of sinks ----


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row to be stored.

    Attributes:
        id: The id as the user gave it; `str(id)` is the key.
        text: The embedded text.
        vector: float32[d], finite.
        content_hash: SHA-256 of the text's UTF-8 bytes, as lower-case hex.
        metadata: JSON text, or None.
    """

    id: RecordId
    text: str = field(repr=False)
    vector: Vectors = field(repr=False)
    content_hash: str
    metadata: str | None = field(default=None, repr=False)


class Sink(Protocol):
    """A store for the rows of `ingest`: any object with these three methods. The classes below add optional ones."""

    async def prepare(self, model: str, dimensions: int | None) -> None:
        """Check everything that can be checked before tokens are paid for; create what is missing. Idempotent.

        Args:
            model: The model's name, part of every row's key.
            dimensions: The size of the vectors; None if it is known only after the first reply.

        Raises:
            SinkConfigError: This sink cannot store vectors of that model and size.
        """
        ...

    async def existing(self, model: str, hashes: Mapping[RecordId, str]) -> set[RecordId]:
        """Return the ids that are stored for this model with exactly the given content hash."""
        ...

    async def write(self, model: str, rows: Sequence[Row]) -> Mapping[RecordId, AsyncEmbedError]:
        """Upsert the rows in one transaction: if it returns they are durable, if it raises none is stored.

        If several rows have the same key, the last one is stored. A cancelled call leaves no transaction open.

        Returns:
            The rows that the store refuses, each with its error; all others are stored. Usually empty.

        Raises:
            SinkError: Nothing of this call was stored.
        """
        ...


@runtime_checkable
class KeyedSink(Sink, Protocol):
    """A sink whose key is not always `str(id)`: in a column of integers "007" and 7 are the same id."""

    def stored_id(self, id: RecordId) -> str:
        """Return the id as it is stored, in text."""
        ...


@runtime_checkable
class CheckingSink(Sink, Protocol):
    """A sink that can reject ids in advance, so that their texts are not paid for."""

    def why_unfit(self, id: RecordId) -> str | None:
        """Return why the sink cannot store an id; None if it can."""
        ...


@runtime_checkable
class PrunableSink(KeyedSink, Protocol):
    """A sink that `ingest(..., prune=True)` can use: it lists and deletes ids."""

    def ids(self, model: str) -> AsyncIterator[str]:
        """Yield the stored ids of the model, as `stored_id` returns them. Yielded ids may be deleted meanwhile."""
        ...

    async def delete(self, ids: Iterable[RecordId], model: str) -> int:
        """Delete the model's rows with these ids in one transaction; return how many rows were deleted."""
        ...


# ---- checks of texts and vectors ----


def check_text(text: object) -> None:
    """Raise an error if no model can embed the value.

    Raises:
        WrongTypeError: It is not a str.
        InvalidTextError: It is empty, or holds a lone surrogate.
    """
    if not isinstance(text, str):
        raise WrongTypeError(f"is {type(text).__name__}; a text is a str")
    if not text:
        raise InvalidTextError("is empty; the API refuses a request that holds an empty text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # from None: the original error shows the text
            raise InvalidTextError(f"has a lone surrogate at character {error.start}, so it is not UTF-8") from None


def check_vectors(vectors: object, count: int) -> None:
    """Raise a `ProtocolError` unless the vectors are float32[count, d], all finite."""
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or len(vectors) != count or not vectors.shape[1]:
        got = getattr(vectors, "shape", type(vectors).__name__)
        raise ProtocolError(f"expected vectors float32[{count}, d], got {got}")
    if vectors.dtype != np.float32:
        raise ProtocolError(f"expected vectors of float32, got {vectors.dtype}")
    check_finite(vectors)


def check_finite(vectors: Vectors) -> None:
    """Raise a `ProtocolError` that names the first row with NaN or infinity, if there is one."""
    finite = np.isfinite(vectors)
    if not finite.all():
        row = int(np.argmin(finite.all(axis=1)))
        raise ProtocolError(f"expected finite numbers, got NaN or infinity for text {row}")
