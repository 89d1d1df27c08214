"""What an HTTP answer means: status, headers and body to one of our errors. Pure, and never raises.

Classified by status, then code and type, and only then by words: the wording changes, and both the old and the
new one are in use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import jiter

from .errors import (
    AuthenticationError,
    BadRequestError,
    FatalProviderError,
    NotFoundError,
    PermissionDeniedError,
    ProviderError,
    QuotaError,
    RateLimitedError,
    RedirectRefusedError,
    RequestError,
    ServerError,
    TooLargeError,
)
from .types import Rates

# A `retry-after` beyond an hour is a mistake or a ban; waiting a day in silence helps nobody.
LONGEST_RETRY_AFTER_S = 3_600.0

# error.code and error.type of 429s that are about money. OpenAI error codes guide, read 2026-08, and the older
# `billing_hard_limit_reached`. Matched by code, not by text: some providers word a limit of concurrency as
# "insufficient quota" (LibreChat-AI/agents#358).
_MONEY = {
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "billing_hard_limit_reached",
    "billing_not_active",
}
_FATAL: dict[int, tuple[type[FatalProviderError], str]] = {
    401: (AuthenticationError, "check the API key, and where it may be used from"),
    403: (PermissionDeniedError, "the key may not use this model or place"),
    404: (NotFoundError, "check the model's name and base_url"),
    405: (RequestError, "base_url leads to something that is no embeddings endpoint"),
    407: (RequestError, "the proxy wants credentials"),
    415: (RequestError, "base_url leads to something that is no embeddings endpoint"),
    451: (PermissionDeniedError, "the provider may not serve this place"),
    501: (RequestError, "the server has no embeddings endpoint"),
    505: (RequestError, "the server does not speak HTTP/1.1"),
}
_TRANSIENT = {408, 409, 424, 425}

# Both wordings of each, as recorded: faults of many servers, so looked for in any 400, 413, 422 and 429.
_TOO_LARGE = re.compile(
    r"max_tokens_per_request|array_above_max_length|tokens_limits_reached|maximum request size|request too large"
    r"|body too large|payload too large|too large to process|batch size .{0,40}(larger|exceed|maximum|max)"
    r"|at most \d+ items|max(imum)? .{0,20}(batch|inputs)|too many inputs",
    re.IGNORECASE,
)
_MAX_INPUTS = re.compile(
    r"at most (\d+) items|maximum (?:allowed )?batch size(?: of)?:? (\d+)|batch size.{0,40}?(?:than|of|is|to) (\d+)",
    re.IGNORECASE,
)
_MAX_TOKENS = re.compile(
    r"max(?:imum)? (?:request size is )?(\d[\d,]*) tokens per request|max size: (\d+) tokens"
    r"|limit:? (\d[\d,]*), requested",
    re.IGNORECASE,
)
_REQUESTED = re.compile(r"requested (\d[\d,]*)", re.IGNORECASE)
_TRY_AGAIN = re.compile(
    r"(?:try again in|retry after) ((?:\d+(?:\.\d+)?(?:ms|h|m|s)\s?)+|\d+(?:\.\d+)? ?(?:seconds?|milliseconds?))",
    re.IGNORECASE,
)
_KEY = re.compile(r"\b(sk|key|pk|Bearer)[-_ ][^\s\"'.,;]{4,}")

# A message is for reading; a proxy's HTML page is not.
_LONGEST_MESSAGE = 300


def error_of(status: int, headers: Mapping[str, str], body: bytes, secrets: tuple[str, ...] = ()) -> ProviderError:
    """Return the error an HTTP answer other than 200 stands for. Never raises, whatever the answer holds.

    Args:
        status: The HTTP status.
        headers: With lower-case names, or a mapping that ignores case.
        body: The answer's body, or its beginning.
        secrets: Strings that must not appear in the message.
    """
    message, code, kind = _read_error(body)
    text = scrub(f"HTTP {status}: {message}" if message else f"HTTP {status}", secrets)
    fields: dict[str, Any] = {"status": status, "code": code, "request_id": headers.get("x-request-id")}
    if status == 429:
        return _rate_error(text, {code, kind}, headers, message, fields)
    if status in _FATAL:
        error, advice = _FATAL[status]
        return error(f"{text} ({advice})", **fields)
    if 300 <= status < 400:
        return RedirectRefusedError(f"{text} (redirects are not followed: set base_url to the new address)", **fields)
    if status in _TRANSIENT or status >= 500:
        if _TOO_LARGE.search(message):  # llama.cpp answers 500 for an input beyond its batch
            return TooLargeError(text, **fields)
        return ServerError(text, retry_after_s=_wait_s(headers, message), **fields)
    if status == 413 or _TOO_LARGE.search(f"{code} {kind} {message}"):
        return _too_large(text, message, fields)
    return BadRequestError(text, **fields)


def rates_of(headers: Mapping[str, str]) -> Rates | None:
    """Return what the `x-ratelimit-…` headers tell; None if they tell no limit. What makes no sense is ignored."""
    rates = Rates(
        limit_requests=_count(headers.get("x-ratelimit-limit-requests")),
        remaining_requests=_count(headers.get("x-ratelimit-remaining-requests")),
        reset_requests_s=parse_duration_s(headers.get("x-ratelimit-reset-requests")),
        limit_tokens=_count(headers.get("x-ratelimit-limit-tokens")),
        remaining_tokens=_count(headers.get("x-ratelimit-remaining-tokens")),
        reset_tokens_s=parse_duration_s(headers.get("x-ratelimit-reset-tokens")),
    )
    return rates if rates.limit_requests or rates.limit_tokens else None


def _count(value: str | None) -> int | None:
    # Azure sends -1 and 0 for "not told" (learn.microsoft.com Q 5625878): a limit of 0 counts as none
    return int(value) if value is not None and len(value) < 16 and value.strip().isdecimal() else None


def scrub(message: str, secrets: tuple[str, ...] = ()) -> str:
    """Return the message without keys, on one line, no longer than is useful."""
    for secret in secrets:
        if secret:
            message = message.replace(secret, "***")
    message = " ".join(_KEY.sub(r"\1-***", message).split())
    return message if len(message) <= _LONGEST_MESSAGE else message[: _LONGEST_MESSAGE - 1] + "…"


def _rate_error(
    text: str, words: set[str | None], headers: Mapping[str, str], message: str, fields: dict[str, Any]
) -> ProviderError:
    if words & _MONEY:
        return QuotaError(f"{text} (waiting does not help: add credit or raise the spend limit)", **fields)
    if "request too large" in message.lower():
        return _too_large(text, message, fields)
    return RateLimitedError(text, retry_after_s=_wait_s(headers, message), **fields)


def _too_large(text: str, message: str, fields: dict[str, Any]) -> TooLargeError:
    return TooLargeError(
        text,
        max_inputs=_number(_MAX_INPUTS, message),
        max_tokens=_number(_MAX_TOKENS, message),
        requested_tokens=_number(_REQUESTED, message),
        **fields,
    )


def _number(pattern: re.Pattern[str], message: str) -> int | None:
    match = pattern.search(message)
    digits = next((group for group in match.groups() if group), "") if match else ""
    return int(digits.replace(",", "")) if 0 < len(digits) < 12 else None


def _read_error(body: bytes) -> tuple[str, str | None, str | None]:
    """Return message, code and type of an error body: OpenAI's, vLLM's, TEI's, FastAPI's, or a page of HTML."""
    try:
        document = jiter.from_json(body)
    except (ValueError, RecursionError):
        return _plain(body), None, None
    if not isinstance(document, Mapping):
        return "", None, None
    inner = document.get("error")
    error = inner if isinstance(inner, Mapping) else document
    message = error.get("message") or error.get("detail") or (inner if isinstance(inner, str) else "")
    code, kind = error.get("code"), error.get("type") or error.get("error_type")
    return str(message), None if code is None else str(code), None if kind is None else str(kind)


def _plain(body: bytes) -> str:
    return re.sub(r"<[^>]*>", " ", body[:2_000].decode(errors="replace"))


def _wait_s(headers: Mapping[str, str], message: str) -> float | None:
    """Return the seconds an answer asks to wait; None if it asks for nothing that makes sense."""
    candidates = [
        _milliseconds(headers.get("retry-after-ms")),
        _seconds_or_date(headers.get("retry-after")),
        *(
            parse_duration_s(headers.get(f"x-ratelimit-reset-{what}"))
            for what in ("requests", "tokens")
            if headers.get(f"x-ratelimit-remaining-{what}", "").strip() == "0"
        ),
        _from_message(message),
    ]
    for seconds in candidates:
        if seconds is not None and 0 < seconds < float("inf"):
            return min(seconds, LONGEST_RETRY_AFTER_S)
    return None


def _milliseconds(value: str | None) -> float | None:
    number = _float(value)
    return None if number is None else number / 1_000


def _seconds_or_date(value: str | None) -> float | None:
    number = _float(value)
    if number is not None or value is None:
        return number
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return (when - datetime.now(UTC)).total_seconds()


def _float(value: str | None) -> float | None:
    try:
        return float(value) if value is not None and len(value) < 40 else None
    except ValueError:
        return None


_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[hms])\s?)+", re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[hms])", re.IGNORECASE)


def parse_duration_s(value: str | None) -> float | None:
    """Return a Go duration (`17ms`, `1s`, `6m0s`, `1m2.5s`) or a plain number of seconds; None for all else."""
    if value is None or len(value) > 40:
        return None
    value = value.strip()
    if _DURATION.fullmatch(value):
        return sum(float(number) * _UNITS_S[unit.lower()] for number, unit in _DURATION_PART.findall(value))
    number = _float(value)
    # a date as seconds since 1970 is no duration
    return number if number is not None and 0 <= number < 1e8 else None


def _from_message(message: str) -> float | None:
    match = _TRY_AGAIN.search(message)
    if not match:
        return None
    words = match[1].strip().lower()
    for name, unit in (("milliseconds", "ms"), ("millisecond", "ms"), ("seconds", "s"), ("second", "s")):
        if words.endswith(name):
            words = words.removesuffix(name).strip() + unit
    return parse_duration_s(words)
