"""All errors that this library raises on purpose.

AsyncEmbedError
├── ConfigError (ValueError)            an option, the key or an address is wrong; nothing was sent
├── InputError (ValueError)             about one text or record; in `ingest` and `stream` only that one fails
│   ├── InvalidTextError                empty, or not encodable as UTF-8
│   ├── WrongTypeError (TypeError)      not a str
│   ├── InvalidRecordError              a record without a usable id, text or metadata; a broken line of a source
│   ├── TooLongError                    more tokens than the model accepts
│   └── RejectedTextError               the provider refused this text
├── ProviderError (RuntimeError)
│   ├── FatalProviderError              further requests would fail as well: the whole run stops
│   │   ├── AuthenticationError         401: the key is wrong
│   │   ├── PermissionDeniedError       403: the key has no permission for this
│   │   ├── NotFoundError               404: no such model, or a wrong base URL
│   │   ├── QuotaError                  429: the quota is used up; waiting does not help
│   │   ├── RedirectRefusedError        3xx: texts are not sent to another address
│   │   ├── CertificateError            TLS: the server's certificate could not be verified
│   │   ├── RequestError                the provider refuses the request whatever its texts
│   │   └── ProviderDownError           no request succeeded within the retry budget
│   ├── RateLimitedError                429: too fast; says how long to wait
│   ├── TooLargeError                   the request was refused for its size; smaller ones may succeed
│   ├── BadRequestError                 400, 422: something in this request is refused
│   ├── ServerError                     5xx and other errors that may pass
│   ├── TransportError                  no complete response: refused, lost, timed out
│   └── ProtocolError                   a response that does not answer the request
├── SomeFailedError (RuntimeError)      raised by `EmbeddingResult.raise_for_failures`
│   └── AllFailedError                  no text was embedded; `.result` has the reasons
├── DeadlineError (TimeoutError)        the call's deadline passed; `.result` holds the work done before
├── OverloadedError (RuntimeError)      too many texts are waiting; nothing was sent
├── SourceError                         a source cannot be reached, or failed while it was read
└── SinkError
    ├── SinkConfigError (ValueError)    no database, a wrong table, another model's dimensions
    ├── SinkBusyError                   another writer held the lock for too long
    └── RowRefusedError                 the store refuses this one row

Messages name the item, the value and the limit; never a text, a key or a password.
All errors can be pickled and copied: they hold plain fields only.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, Self


def _rebuild(cls: type[AsyncEmbedError], message: str) -> Any:
    return cls.__new__(cls, message)


class AsyncEmbedError(Exception):
    """The root of the tree: catching it catches every error that this library raises on purpose.

    An error that ends a call has the work done before it as `result` (an `EmbeddingResult`) or `report` (an
    `IngestReport`).
    """

    result: Any = None
    report: Any = None

    def __copy__(self) -> Self:
        copied: Self = _rebuild(type(self), str(self))
        copied.__dict__.update(self.__dict__)
        copied.__cause__ = self.__cause__
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception.__reduce__ calls __init__ with `args` alone, which loses keyword-only fields
        return _rebuild, (type(self), str(self)), self.__dict__


class ConfigError(AsyncEmbedError, ValueError):
    """An option, the key or an address is wrong. Nothing was sent."""


class InputError(AsyncEmbedError, ValueError):
    """One text or record cannot be embedded. The others can.

    `record_id` is the id of the record, if a source that could not read the rest of it knows the id.
    """

    record_id: Any = None


class InvalidTextError(InputError):
    """The text is empty, or holds a lone surrogate and so cannot be encoded as UTF-8."""


class WrongTypeError(InputError, TypeError):
    """A value that is not a str is in the place of a text."""


class InvalidRecordError(InputError):
    """The record has no usable id, text or metadata, or its line in the source is broken."""


@dataclass(eq=False, repr=False)
class TooLongError(InputError):
    """The text has more tokens than the model accepts in one input.

    `tokens` is their number, or a proven lower bound of it; `limit` is the model's limit.
    """

    message: InitVar[str]  # Exception.__new__ keeps it in `args`
    _: KW_ONLY
    tokens: int
    limit: int


class RejectedTextError(InputError):
    """The provider refused a request that held only this text. `__cause__` is the provider's error."""


@dataclass(eq=False, repr=False)
class ProviderError(AsyncEmbedError, RuntimeError):
    """A request to the provider failed.

    `status` is the HTTP status (None without a response), `code` the provider's own name for the error, `request_id`
    the id for its support, `retry_after_s` the wait in seconds that it requested, if any, `rates` the limits in its
    headers (`types.Rates`), `requests` the number of requests sent.
    """

    message: InitVar[str]
    _: KW_ONLY
    status: int | None = None
    code: str | None = None
    request_id: str | None = None
    retry_after_s: float | None = None
    rates: Any = field(default=None, init=False)
    requests: int = field(default=1, init=False)


class FatalProviderError(ProviderError):
    """Further requests would fail as well: the whole run stops. `result` or `report` holds the work done before."""


class AuthenticationError(FatalProviderError):
    """401: the key is wrong, revoked, or not allowed from this address."""


class PermissionDeniedError(FatalProviderError):
    """403: the key is valid but has no permission for this."""


class NotFoundError(FatalProviderError):
    """404: the model does not exist for this key, or `base_url` is wrong."""


class QuotaError(FatalProviderError):
    """429 because the quota is used up, not because of the rate: waiting does not help."""


class RedirectRefusedError(FatalProviderError):
    """3xx: following the redirect would send texts and key to an address that was not configured."""


class CertificateError(FatalProviderError):
    """The server's certificate could not be verified."""


class RequestError(FatalProviderError):
    """The provider refuses the request whatever its texts: a method, a header, an option."""


class ProviderDownError(FatalProviderError):
    """No request succeeded within the retry budget: an outage, not a bad text."""


class RateLimitedError(ProviderError):
    """429: too fast. `retry_after_s` is the wait that the provider requested, None if it named none."""


@dataclass(eq=False, repr=False)
class TooLargeError(ProviderError):
    """The request was refused for its size.

    `max_inputs` or `max_tokens` is the limit the provider named, `requested_tokens` its own count of the request;
    None where it named none.
    """

    _: KW_ONLY
    max_inputs: int | None = None
    max_tokens: int | None = None
    requested_tokens: int | None = None


class BadRequestError(ProviderError):
    """400 or 422: something in this request is refused. Splitting the request finds the text."""


class ServerError(ProviderError):
    """5xx, 408, 409, 424, 425: a retry may succeed."""


@dataclass(eq=False, repr=False)
class TransportError(ProviderError):
    """No complete response was received: the connection was refused, lost or cut; or, if `timed_out`, it took too long.

    If it was not `connected`, nothing was sent.
    """

    _: KW_ONLY
    timed_out: bool = False
    connected: bool = True


class ProtocolError(ProviderError):
    """A response that does not answer the request: wrong count, order, size or numbers.

    `tokens` is the number of tokens that the provider has billed for it; 0 if it did not report any.
    """

    tokens: int = 0


class SomeFailedError(AsyncEmbedError, RuntimeError):
    """Some texts were not embedded. `result` has the others; `__cause__` is the first failure."""


class AllFailedError(SomeFailedError):
    """No text was embedded. `result.failures` has the reasons; `__cause__` is the first of them."""


class DeadlineError(AsyncEmbedError, TimeoutError):
    """The call's deadline passed. `result` or `report` holds the work done before; nothing is left running."""


@dataclass(eq=False, repr=False)
class OverloadedError(AsyncEmbedError, RuntimeError):
    """With this call more than `max_waiting` texts would be waiting. Nothing was sent for it.

    `retry_after_s` estimates in how many seconds there will be room. A web app can return it to its client.
    """

    message: InitVar[str]
    _: KW_ONLY
    retry_after_s: float


class SourceError(AsyncEmbedError):
    """A source cannot be reached, or failed while it was read. Stored rows stay, and a rerun skips them."""


class SinkError(AsyncEmbedError):
    """A call of the store failed. Its batch is stored completely or not at all."""


class SinkConfigError(SinkError, ValueError):
    """Target, table, columns or dimensions do not fit. Detected, wherever possible, before a token is paid."""


class SinkBusyError(SinkError):
    """Another writer held the lock, or other callers all connections, for longer than the timeout."""


class RowRefusedError(SinkError):
    """The store refuses this one row. The others of its batch are stored."""
