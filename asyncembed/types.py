"""The values that flow through the library, and the seams between its parts.

Vectors are `float32[n, d]`, C-contiguous: row i belongs to text i. Texts and metadata are kept out of every
repr: what is logged by accident must not leak what was embedded.
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

Vectors: TypeAlias = npt.NDArray[np.float32]
"""float32[n, d], or float32[d] where one vector is meant."""

RecordId: TypeAlias = str | int | UUID
"""Stores keep ids as text: the number 5 and the string "5" are the same id."""


@dataclass(frozen=True, slots=True)
class Record:
    """One thing to embed and store.

    Args:
        id: A str, an int or a UUID, unique in its table.
        text: What is embedded, as it is.
        metadata: Anything JSON can hold; stored beside the vector.
    """

    id: RecordId
    text: str = field(repr=False)
    metadata: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """One text that was not embedded, or one record that was not stored.

    Attributes:
        index: Its position in the input, counted from 0.
        error: Why.
        id: The record's id; None in `embed`, and where the record had none.
    """

    index: int
    error: AsyncEmbedError
    id: RecordId | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield index and error, for `for index, error in result.failures`."""
        return iter((self.index, self.error))


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedRecord:
    """What `stream` yields: the record, and either its vector float32[d] or the error."""

    record: Record
    vector: Vectors | None = field(repr=False)
    error: AsyncEmbedError | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """What an answer's headers tell of the provider's limits; None for what they do not tell.

    `reset_…_s` are the seconds until a limit is full again, not the wait that is needed.
    """

    limit_requests: int | None = None
    remaining_requests: int | None = None
    reset_requests_s: float | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_s: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What one request brought: float32[n, d], row i for text i, and what the provider billed.

    Attributes:
        vectors: float32[n, d], all finite.
        tokens: Tokens billed as the provider said; None if it did not say.
        rates: What the answer told of the provider's limits; None if nothing.
        model: The model that the provider says it used; None if it did not say.
        requests: How many it took: more than one if the provider refused to be asked in that way.
    """

    vectors: Vectors = field(repr=False)
    tokens: int | None
    rates: Rates | None = None
    model: str | None = None
    requests: int = 1


@dataclass(frozen=True, slots=True)
class ProviderInfo:
    """What a provider says about itself; the defaults are those of a provider that says nothing.

    Attributes:
        base_url: The address that texts are sent to, path included; None if there is none.
        identity: What the provider counts its rate limits by, usually address and a hash of the key. Embedders whose
            providers have equal identities share one rate limiter. None: the provider object itself.
        dimensions: The size of the vectors, once it is known.
        encoding_format: The format in which vectors are requested; None if none is named.
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
    """Sends one request to one place. Safe to call from many tasks at once."""

    async def embed(self, texts: Sequence[str]) -> Reply:
        """Send one request and return its validated reply.

        Raises:
            ProviderError: The request failed; nothing of its reply is used.
        """
        ...

    async def aclose(self) -> None:
        """Close what was opened here, and nothing that was handed in."""
        ...


@runtime_checkable
class DescribedProvider(Provider, Protocol):
    """A provider that says more about itself than the defaults of `ProviderInfo`."""

    @property
    def info(self) -> ProviderInfo:
        """What is known now; the first reply may add to it."""
        ...


def info_of(provider: Provider) -> ProviderInfo:
    """Return what a provider says about itself."""
    return provider.info if isinstance(provider, DescribedProvider) else ProviderInfo()


class Cache(Protocol):
    """Keeps vectors by a hash of their text and all that decides their numbers. Safe to call from many tasks at once.

    It can fail no call: what it raises is logged once and counts as a miss, except a `ConfigError`, which says that
    it can never work. What it takes its time for, its callers wait for: give it a timeout.
    """

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        """Return those it has, each float32[d]. A key has 32 bytes. The caller alters none of them."""
        ...

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        """Keep copies of the vectors, each float32[d]: what is handed in is a part of something larger."""
        ...

    async def aclose(self) -> None:
        """Let go of what was opened here."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row on its way to a store.

    Attributes:
        id: As the user gave it; `str(id)` is the key.
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


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result. `score` is the cosine similarity, from -1 to 1."""

    id: str
    score: float
    text: str | None = field(default=None, repr=False)
    metadata: Mapping[str, Any] | None = field(default=None, repr=False)


class Sink(Protocol):
    """Where `ingest` stores rows. Any object with these three methods will do; more are optional, see below."""

    async def prepare(self, model: str, dimensions: int | None) -> None:
        """Check all that can be checked before a token is paid; create what is missing. Idempotent.

        Args:
            model: The model's name, part of every row's key.
            dimensions: The vectors' size; None if the first vector will tell.

        Raises:
            SinkConfigError: This sink cannot take vectors of that model and size.
        """
        ...

    async def existing(self, model: str, hashes: Mapping[RecordId, str]) -> set[RecordId]:
        """Return those of the given ids that are stored for this model with this very content hash."""
        ...

    async def write(self, model: str, rows: Sequence[Row]) -> Mapping[RecordId, AsyncEmbedError]:
        """Upsert the rows in one transaction: when it returns they are durable, when it raises none is.

        Of rows with the same key the last one wins. A cancelled call leaves no transaction open.

        Returns:
            The rows which the store refuses, each with its error; all others are stored. Mostly empty.

        Raises:
            SinkError: Nothing of this call was stored.
        """
        ...


@runtime_checkable
class KeyedSink(Sink, Protocol):
    """A sink whose key is not always `str(id)`: in a column of integers "007" and 7 are one id."""

    def stored_id(self, id: RecordId) -> str:
        """Return the id as it is stored, in text."""
        ...


@runtime_checkable
class CheckingSink(Sink, Protocol):
    """A sink that knows in advance which ids it cannot hold, so that their texts are not paid for."""

    def why_unfit(self, id: RecordId) -> str | None:
        """Return what is wrong with an id; None if the sink can hold it."""
        ...


@runtime_checkable
class PrunableSink(KeyedSink, Protocol):
    """A sink that `ingest(..., prune=True)` can use: it lists and deletes ids."""

    def ids(self, model: str) -> AsyncIterator[str]:
        """Yield the stored ids of the model, as `stored_id` returns them. Yielded ids may be deleted meanwhile."""
        ...

    async def delete(self, ids: Iterable[RecordId], model: str) -> int:
        """Delete the model's rows with these ids in one transaction; return how many there were."""
        ...


def check_text(text: object) -> None:
    """Raise if no model could embed the value.

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
            # from None: the original shows the text
            raise InvalidTextError(f"has a lone surrogate at character {error.start}, so it is not UTF-8") from None


def check_vectors(vectors: object, count: int) -> None:
    """Raise a `ProtocolError` unless they are float32[count, d], all finite, as a provider promises."""
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
