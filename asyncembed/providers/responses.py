"""Turns the status, headers and body of an HTTP error into one of our errors (a 429 into `RateLimitedError`), and reads
the rate limits in headers. Pure, and never raises.

An answer is classified by its status, then by code and type, and only then by its message: providers change the
wording, and servers use both the old and the new one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import jiter

from ..errors import (
    AuthenticationError,
    BadRequestError,
    FatalProviderError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    ProviderError,
    QuotaError,
    RateLimitedError,
    RedirectRefusedError,
    RequestError,
    ServerError,
    TooLargeError,
)
from ..types import Rates

# A longer `retry-after` is a mistake or a ban, and waiting for a day without an error would hide it.
LONGEST_RETRY_AFTER_S = 3_600.0

# error.code and error.type of errors about money. OpenAI error codes guide, read 2026-08, and the older
# `billing_hard_limit_reached`. Matched by code, not by message: some providers also call a concurrency or rate limit
# "exceeded your current quota" (LibreChat-AI/agents#358, Gemini).
_MONEY = {
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "billing_hard_limit_reached",
    "billing_not_active",
}
# Proxies and servers that answer 400 to everything still send these codes.
_STATUS_OF_CODE = {"invalid_api_key": 401, "unsupported_country_region_territory": 403, "model_not_found": 404}
_NO_ENDPOINT = "there is no embeddings endpoint at base_url"
_FATAL: dict[int, tuple[type[FatalProviderError], str]] = {
    401: (AuthenticationError, "check the API key, and where it may be used from"),
    402: (QuotaError, "waiting does not help: add credit"),
    403: (PermissionDeniedError, "the key may not use this model or place"),
    **dict.fromkeys((404, 410), (NotFoundError, "check the model's name and base_url")),
    **dict.fromkeys((405, 411, 414, 415, 417, 421, 428), (RequestError, _NO_ENDPOINT)),
    407: (RequestError, "the proxy wants credentials"),
    **dict.fromkeys((426, 505), (RequestError, "the server does not speak HTTP/1.1")),
    431: (RequestError, "the headers are too long: check the API key"),
    451: (PermissionDeniedError, "the provider may not serve this place"),
    501: (RequestError, "the server has no embeddings endpoint"),
    511: (RequestError, "the network wants a login"),
}
_TRANSIENT = {408, 409, 424, 425}

# Wordings as recorded from many servers (tests/providers/test_responses.py names them), so searched in any 4xx.
_TOO_LARGE = re.compile(
    r"max_tokens_per_request|array_above_max_length|tokens_limits_reached|too large|too many (?:inputs|tokens)",
    re.IGNORECASE,
)
_MAX_INPUTS = re.compile(
    r"at most (\d+) (?:items|requests|texts|inputs|elements)|texts must be at most (\d+)"
    r"|max(?:imum)? (?:allowed )?(?:batch size|number of inputs)(?: of| is|:)? (\d+)"
    r"|maximum length (\d+), but got an array|batch size limit is (\d+)"
    r"|batch size .{0,40}not be larger than (\d+)|too many inputs.{0,40}max: (\d+)",
    re.IGNORECASE,
)
_MAX_TOKENS = re.compile(
    r"max(?:imum request size is)? (\d[\d,]*) tokens per request|max size: (\d[\d,]*) tokens"
    r"|limit:? (\d[\d,]*),(?: used \d[\d,]*,)? requested|max allowed tokens per submitted batch is (\d[\d,]*)",
    re.IGNORECASE,
)
_REQUESTED = re.compile(r"requested (\d[\d,]*)|your batch has (\d[\d,]*) tokens", re.IGNORECASE)
# The model does not support an option: no text is to blame, and no smaller request will succeed.
_OPTION = re.compile(r"support specifying dimensions|invalid value for '?dimensions", re.IGNORECASE)

# "sk-…" as servers quote it, whole or starred out, the word after "Bearer", and any other word with stars in it.
_KEY = re.compile(r"\b(?:sk|pk|rk|key)[-_][\w*-]{4,}|\bBearer\s+\S+|[\w.-]{0,64}\*{3,}[\w.*-]{0,64}", re.IGNORECASE)
# Shorter ones are no secrets ("none" is sent to servers without keys), and would be found in any word.
_SHORTEST_SECRET = 6

# The part of a message that is searched, which bounds the work that a hostile body can cause.
_LONGEST_SEARCHED = 8_000
_LONGEST_NUMBER = 40  # characters of a number or date in a header
_LONGEST_MESSAGE = 300  # it is for people to read; a proxy's HTML page is not


def error_of(status: int, headers: Mapping[str, str], body: bytes, secrets: Sequence[str] = ()) -> ProviderError:
    """Return the error for an HTTP answer other than 200, without the secrets. Never raises, for any content.

    `headers` have lower-case names, or ignore case. Of the body the beginning is enough.
    """
    message, code, kind = _read_error(body[:_LONGEST_SEARCHED])
    text = scrub(f"HTTP {status}: {message}" if message else f"HTTP {status}", secrets)
    fields: dict[str, Any] = {
        "status": status,
        "code": code or kind,
        "request_id": headers.get("x-request-id", "")[:100] or None,
    }
    meant = _STATUS_OF_CODE.get(code or "", status) if 400 <= status < 500 else status
    if status >= 400 and {code, kind} & _MONEY:
        return QuotaError(f"{text} (waiting does not help: add credit or raise the spend limit)", **fields)
    if meant in _FATAL:
        error, advice = _FATAL[meant]
        return error(f"{text} ({advice})", **fields)
    if status < 300:
        return ProtocolError(f"expected vectors, got {text}", **fields)
    if status < 400:
        return RedirectRefusedError(f"{text} (redirects are not followed: set base_url to the new address)", **fields)
    if _is_too_large(status, f"{code} {kind} {message}"):
        return TooLargeError(
            text,
            max_inputs=_number(_MAX_INPUTS, message),
            max_tokens=_number(_MAX_TOKENS, message),
            requested_tokens=_number(_REQUESTED, message),
            **fields,
        )
    if status == 429:
        return RateLimitedError(text, retry_after_s=_wait_s(headers, message), **fields)
    if status in _TRANSIENT or status >= 500:
        return ServerError(text, retry_after_s=_wait_s(headers, message), **fields)
    if _OPTION.search(message):
        return RequestError(text, **fields)
    return BadRequestError(text, **fields)


def _is_too_large(status: int, words: str) -> bool:
    if status == 413:
        return True
    if status == 429:  # more than the limit per minute in one request: it can never succeed, after any wait
        limit, requested = _number(_MAX_TOKENS, words), _number(_REQUESTED, words)
        return "request too large" in words.lower() or (limit is not None and (requested or 0) > limit)
    if status >= 500 or status in _TRANSIENT:  # llama.cpp answers 500 to an input larger than its batch
        return "too large to process" in words.lower()
    return any(pattern.search(words) for pattern in (_TOO_LARGE, _MAX_INPUTS, _MAX_TOKENS))


def rates_of(headers: Mapping[str, str]) -> Rates | None:
    """Return the limits of the `x-ratelimit-…` headers; None without a limit. Malformed values are ignored."""
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
    # Azure sends -1 and 0 for "unknown" (learn.microsoft.com Q 5625878): a limit of 0 counts as none
    return int(value) if value is not None and len(value) < 16 and value.strip().isdecimal() else None


def is_other_model(requested: str, reported: str | None) -> bool:
    """Return whether a reply names another model. `openai/x` behind a proxy is x; ada-002 is `…-ada-002-v2`."""
    return bool(reported) and requested.rpartition("/")[2].lower() not in str(reported).lower()


def scrub(message: str, secrets: Sequence[str] = ()) -> str:
    """Return the message without keys, on one line, and shortened."""
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            message = message.replace(secret, "***")
    message = " ".join(_KEY.sub("***", message).split())
    return message if len(message) <= _LONGEST_MESSAGE else message[: _LONGEST_MESSAGE - 1] + "…"


def _number(pattern: re.Pattern[str], message: str) -> int | None:
    match = pattern.search(message)
    digits = next((group for group in match.groups() if group), "") if match else ""
    return int(digits.replace(",", "")) if 0 < len(digits) < 12 else None


def _read_error(body: bytes) -> tuple[str, str | None, str | None]:
    """Return message, code and type from an error body of OpenAI, vLLM, TEI or FastAPI, or from a page of HTML."""
    text = body.decode(errors="replace")  # it may be cut within a character
    try:
        document = jiter.from_json(text.encode(), partial_mode="trailing-strings")
    except (ValueError, RecursionError):
        return re.sub(r"<[^<>]*>", " ", text), None, None
    if isinstance(document, list) and document:
        document = document[0]  # Gemini puts a list around it
    if not isinstance(document, Mapping):
        return _words(document), None, None
    inner = document.get("error")
    error = inner if isinstance(inner, Mapping) else document
    code, *kinds = (_word(error.get(key)) for key in ("code", "type", "error_type", "status"))
    return _words(error), code, next(filter(None, kinds), None)


def _words(value: Any) -> str:
    """Return the message of an error. FastAPI's lists also hold the input: only sentences are taken."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(filter(None, map(_words, value[:3])))
    if isinstance(value, Mapping):
        return next(filter(None, (_words(value.get(key)) for key in ("message", "msg", "detail", "error"))), "")
    return ""


def _word(value: Any) -> str | None:
    return str(value)[:100] if isinstance(value, (str, int)) and value != "" else None


def _wait_s(headers: Mapping[str, str], message: str) -> float | None:
    """Return the seconds that an answer asks the client to wait; None without a usable value."""
    try_again = _TRY_AGAIN.search(message)
    candidates = [
        (_float(headers.get("retry-after-ms")) or 0) / 1_000,
        _seconds_or_date(headers.get("retry-after"), headers.get("date")),
        *(
            parse_duration_s(headers.get(f"x-ratelimit-reset-{what}"))
            for what in ("requests", "tokens")
            if headers.get(f"x-ratelimit-remaining-{what}", "").strip() == "0"
        ),
        parse_duration_s(try_again[1] if try_again else None),
    ]
    usable = (seconds for seconds in candidates if seconds is not None and 0 < seconds < float("inf"))
    return next((min(seconds, LONGEST_RETRY_AFTER_S) for seconds in usable), None)


def _seconds_or_date(value: str | None, now: str | None) -> float | None:
    number = _float(value)
    if number is not None or value is None:
        return number
    when = _date(value)
    # by the server's clock if the answer has it: the local one may be wrong
    return None if when is None else (when - (_date(now or "") or datetime.now(UTC))).total_seconds()


def _date(value: str) -> datetime | None:
    try:
        when = parsedate_to_datetime(value[:_LONGEST_NUMBER])
        return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _float(value: str | None) -> float | None:
    try:
        return float(value) if value is not None and len(value) <= _LONGEST_NUMBER else None
    except ValueError:
        return None


# Headers use Go's spelling (`17ms`, `6m0s`), messages use words.
_UNITS_S = {
    "ns": 1e-9,
    **dict.fromkeys(("us", "µs"), 1e-6),
    **dict.fromkeys(("ms", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("s", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3_600.0),
}
_PART = rf"(\d+(?:\.\d+)?) ?({'|'.join(sorted(_UNITS_S, key=len, reverse=True))})"
# ASCII, because otherwise "ſ" would match as an s, and is no key of the table
_DURATION = re.compile(rf"(?:{_PART} ?)+", re.IGNORECASE | re.ASCII)
_DURATION_PART = re.compile(_PART, re.IGNORECASE | re.ASCII)
_TRY_AGAIN = re.compile(rf"(?:try again|retry) (?:in|after) ((?:{_PART} ?)+)", re.IGNORECASE | re.ASCII)


def parse_duration_s(value: str | None) -> float | None:
    """Return the seconds of a Go duration (`17ms`, `1s`, `6m0s`, `1m2.5s`) or a plain number; else None."""
    if value is None or len(value) > _LONGEST_NUMBER:
        return None
    value = value.strip()
    if _DURATION.fullmatch(value):
        return sum(float(number) * _UNITS_S[unit.lower()] for number, unit in _DURATION_PART.findall(value))
    number = _float(value)
    # a date as seconds since 1970 is no duration
    return number if number is not None and 0 <= number < 1e8 else None
