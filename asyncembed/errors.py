"""Every error this library raises on purpose.

AsyncEmbedError
├── ConfigError (ValueError)            options, key or address are wrong; nothing was sent
├── InputError (ValueError)             one text or record; in `ingest` and `stream` it fails alone
│   ├── InvalidTextError                empty, or not encodable as UTF-8
│   ├── WrongTypeError (TypeError)      not a str
│   ├── InvalidRecordError              a record without a usable id, text or metadata; a broken line of a source
│   ├── TooLongError                    more tokens than the model takes
│   └── RejectedTextError               the provider refused this text
├── ProviderError (RuntimeError)
│   ├── FatalProviderError              going on is pointless: the whole run stops
│   │   ├── AuthenticationError         401: the key is wrong
│   │   ├── PermissionDeniedError       403: the key may not do this
│   │   ├── NotFoundError               404: no such model, or a wrong base URL
│   │   ├── QuotaError                  429: out of money, not out of rate
│   │   ├── RedirectRefusedError        3xx: texts are not re-sent to another address
│   │   ├── CertificateError            TLS: the server could not be trusted
│   │   ├── RequestError                the provider refuses the request whatever its texts
│   │   └── ProviderDownError           no request succeeded within the retry budget
│   ├── RateLimitedError                429: too fast; tells how long to wait
│   ├── TooLargeError                   the request was refused for its size; smaller ones may pass
│   ├── BadRequestError                 400, 422: something in this request is refused
│   ├── ServerError                     5xx and other answers that may pass by themselves
│   ├── TransportError                  no whole answer came: refused, lost, timed out
│   └── ProtocolError                   an answer came, but not the one that was asked for
├── SomeFailedError (RuntimeError)      what `EmbeddingResult.raise_for_failures` raises
│   └── AllFailedError                  not one text was embedded; `.result` tells why
├── DeadlineError (TimeoutError)        the call's deadline passed; `.result` holds what was done
├── OverloadedError (RuntimeError)      more calls wait than may; nothing was asked for
├── SourceError                         a source cannot be reached, or broke off in the middle
└── SinkError
    ├── SinkConfigError (ValueError)    no database, a wrong table, another model's dimensions
    ├── SinkBusyError                   somebody else held the lock for too long
    └── RowRefusedError                 the store refuses this one row

Messages name the item, the value and the limit; never a text, a key or a password.
All of them can be pickled and copied: they hold plain fields only.
"""

from __future__ import annotations

from typing import Any, Self, TypeVar

E = TypeVar("E", bound="AsyncEmbedError")


def _rebuild(cls: type[E], message: str, state: dict[str, Any]) -> E:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class AsyncEmbedError(Exception):
    """The root of the tree: catching it catches everything this library raises on purpose.

    `result` (an `EmbeddingResult`) or `report` (an `IngestReport`) is set on an error that ends a call:
    all that was done before it.
    """

    result: Any = None
    report: Any = None

    def __copy__(self) -> Self:
        mine = _rebuild(type(self), str(self), dict(self.__dict__))
        mine.__cause__ = self.__cause__
        return mine

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls __init__ with `args` alone, which loses keyword-only fields.
        return _rebuild, (type(self), str(self), dict(self.__dict__))


class ConfigError(AsyncEmbedError, ValueError):
    """Options, key or address are wrong. Nothing was sent."""


class InputError(AsyncEmbedError, ValueError):
    """One text or record cannot be embedded. The others can.

    `record_id` is set by a source that knows the id of the record which it cannot hand over.
    """

    record_id: Any = None


class InvalidTextError(InputError):
    """The text is empty, or holds a lone surrogate and so is no UTF-8."""


class WrongTypeError(InputError, TypeError):
    """Something that is not a str stands where a text belongs."""


class InvalidRecordError(InputError):
    """The record has no usable id, text or metadata, or its line in the source is broken."""


class TooLongError(InputError):
    """The text has more tokens than the model takes in one input.

    `tokens` is the count, or a proven lower bound of it; `limit` is what the model takes.
    """

    def __init__(self, message: str, *, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class RejectedTextError(InputError):
    """The provider refused a request that held this text alone. `__cause__` has its answer."""


class ProviderError(AsyncEmbedError, RuntimeError):
    """What a provider answered, or that it did not.

    `status` is the HTTP status (None if there was no answer), `code` the provider's own word for it, `request_id`
    what its support asks for, `rates` what its headers told of its limits (`types.Rates`), `requests` how many it took.
    """

    rates: Any = None
    requests: int = 1

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.request_id = request_id


class FatalProviderError(ProviderError):
    """Going on is pointless: the whole run stops, what is done is kept on `result` or `report`."""


class AuthenticationError(FatalProviderError):
    """401: the key is wrong, revoked, or not allowed from this address."""


class PermissionDeniedError(FatalProviderError):
    """403: the key is right but may not do this."""


class NotFoundError(FatalProviderError):
    """404: the model does not exist for this key, or `base_url` leads elsewhere."""


class QuotaError(FatalProviderError):
    """429 about money, not about rate: waiting does not help."""


class RedirectRefusedError(FatalProviderError):
    """3xx: following it would send texts and key to an address nobody chose."""


class CertificateError(FatalProviderError):
    """The server's certificate could not be verified."""


class RequestError(FatalProviderError):
    """The provider refuses the request whatever its texts: a method, a header, an option."""


class ProviderDownError(FatalProviderError):
    """Nothing succeeded within the retry budget: an outage, not a bad text."""


class RateLimitedError(ProviderError):
    """429: too fast. `retry_after_s` is what the provider asked for in seconds, None if nothing."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.retry_after_s = retry_after_s


class TooLargeError(ProviderError):
    """The request was refused for its size.

    `max_inputs` or `max_tokens` is the limit the provider named, `requested_tokens` its own count of the request;
    None where it named none.
    """

    def __init__(
        self,
        message: str,
        *,
        max_inputs: int | None = None,
        max_tokens: int | None = None,
        requested_tokens: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.max_inputs = max_inputs
        self.max_tokens = max_tokens
        self.requested_tokens = requested_tokens


class BadRequestError(ProviderError):
    """400 or 422: something in this request is refused; which text it is, splitting finds out."""


class ServerError(ProviderError):
    """5xx, 408, 409, 424, 425: may pass by itself. `retry_after_s` as in RateLimitedError."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.retry_after_s = retry_after_s


class TransportError(ProviderError):
    """No whole answer came: refused, lost, cut, or, if `timed_out`, not in time.

    Unless it was `connected` nothing was sent.
    """

    def __init__(self, message: str, *, timed_out: bool = False, connected: bool = True, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.timed_out = timed_out
        self.connected = connected


class ProtocolError(ProviderError):
    """An answer came, but not the one that was asked for: wrong count, order, size or numbers.

    `tokens` is what the provider has billed for it all the same; 0 if it did not say.
    """

    tokens: int = 0


class SomeFailedError(AsyncEmbedError, RuntimeError):
    """Some texts were not embedded. `result` has the rest; `__cause__` is the first failure."""


class AllFailedError(SomeFailedError):
    """Not one text was embedded. `result.failures` tells why; `__cause__` is the first of them."""


class DeadlineError(AsyncEmbedError, TimeoutError):
    """The call's deadline passed. `result` or `report` holds what was done; nothing is left running."""


class OverloadedError(AsyncEmbedError, RuntimeError):
    """More calls wait for an answer than may (`max_waiting`). Nothing was asked for.

    `retry_after_s` is an estimate, in seconds, of when there is room again: what a web app tells its client.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SourceError(AsyncEmbedError):
    """A source cannot be reached, or broke off in the middle. What was stored stays, and a rerun skips it."""


class SinkError(AsyncEmbedError):
    """The store could not do what it was asked. The batch it was asked for is stored whole or not at all."""


class SinkConfigError(SinkError, ValueError):
    """Target, table, columns or dimensions do not fit. Found, wherever possible, before a token is paid."""


class SinkBusyError(SinkError):
    """Somebody else held the lock, or all connections, for longer than we wait."""


class RowRefusedError(SinkError):
    """The store refuses this one row. The others of its batch are stored."""
