"""From the bytes of a request to the bytes of an answer. Pure: no socket, no clock.

`parse_request` parses a body, `check` refuses it for the API's reasons, in its order and words, and `reply_to` makes
the vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jiter

from ..models import BYTES_PER_ESTIMATED_TOKEN, lookup
from ..types import Vectors
from .dialects import INVALID_INPUT, Dialect, Json, Wording
from .rate_limits import Exceeded, go_duration
from .vectors import as_base64, as_numbers, embeddings_of

CountTokens: TypeAlias = Callable[[Sequence[str]], list[int]]
"""Returns the number of tokens of each text."""


JSON: Mapping[str, str] = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer. `content-length` and `connection` are added when it is sent."""

    status: int
    body: bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)


class RefusedRequestError(Exception):
    """The request is answered with this error. If `wait_s` is a number, it is accepted after that many seconds."""

    def __init__(self, error: Wording, wait_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """The body of a request, parsed.

    Attributes:
        model: The name in the body, or in Azure's path.
        texts: The inputs; an input of token ids is given as their JSON.
        counts: Tokens of each input.
        estimates: ⌈UTF-8 bytes / 4⌉ of each input.
        dimensions: The requested dimensions, or None.
        base64: Whether base64 was requested.
    """

    model: str
    texts: tuple[str, ...] = field(repr=False)
    counts: tuple[int, ...] = field(repr=False)
    estimates: tuple[int, ...] = field(repr=False)
    dimensions: int | None
    base64: bool

    @property
    def tokens(self) -> int:
        """The tokens of all inputs; they are billed."""
        return sum(self.counts)

    @property
    def estimated_tokens(self) -> int:
        """The estimate for all inputs."""
        return sum(self.estimates)

    @property
    def weight(self) -> int:
        """The larger of tokens and estimate, which limits and rate limits count."""
        return max(self.tokens, self.estimated_tokens)


_NO_JSON = Wording(
    400,
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON.)",
)
_NO_MODEL = Wording(400, "you must provide a model parameter")
_UNKNOWN_MODEL = Wording(
    404,
    "The model `{model}` does not exist or you do not have access to it.",
    code="model_not_found",
)
_NO_DIMENSIONS = Wording(400, "This model does not support specifying dimensions.")
_TOO_MANY_DIMENSIONS = Wording(
    400, "Invalid value for 'dimensions' = {got}. Must be less than or equal to {limit}.", param="dimensions"
)
_NO_BASE64 = Wording(400, "base64 encoding is not currently supported")


def parse_request(body: bytes, count_tokens: CountTokens, model: str | None = None) -> ParsedRequest:
    """Parse a body.

    Args:
        body: The bytes that were sent.
        count_tokens: Counts the tokens of texts.
        model: The model in the path; a model in the body takes precedence.

    Raises:
        RefusedRequestError: The body is not JSON, or its values are of the wrong type.
    """
    try:
        fields = jiter.from_json(body)
    except (ValueError, RecursionError):
        raise RefusedRequestError(_NO_JSON) from None
    if not isinstance(fields, dict):
        raise RefusedRequestError(_NO_JSON)
    model = fields.get("model", model)
    if not isinstance(model, str) or not model:
        raise RefusedRequestError(_NO_MODEL)
    dimensions = fields.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise RefusedRequestError(_invalid("dimensions"))
    encoding = fields.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise RefusedRequestError(_invalid("encoding_format"))
    texts, counts, estimates = _inputs(fields.get("input"), count_tokens)
    return ParsedRequest(model, texts, counts, estimates, dimensions, encoding == "base64")


def _invalid(name: str) -> Wording:
    return Wording(400, INVALID_INPUT.message.replace("input", name))


def _inputs(given: Any, count_tokens: CountTokens) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    if isinstance(given, str) or _are_ids(given):
        given = [given]
    if not isinstance(given, list):
        raise RefusedRequestError(INVALID_INPUT)
    if all(isinstance(text, str) for text in given):
        return tuple(given), tuple(count_tokens(given)), tuple(estimate_tokens(given))
    if all(_are_ids(ids) for ids in given):
        counts = tuple(len(ids) for ids in given)
        return tuple(json.dumps(ids) for ids in given), counts, counts
    raise RefusedRequestError(INVALID_INPUT)


def estimate_tokens(texts: Sequence[str]) -> list[int]:
    """Return ⌈UTF-8 bytes / 4⌉ of each text, as the API counts for its limit per request (see `models`)."""
    sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    return [-(-size // BYTES_PER_ESTIMATED_TOKEN) for size in sizes]


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(number) is int for number in given)


def check(request: ParsedRequest, dialect: Dialect, size: int, models: Sequence[str] | None) -> None:
    """Check model, number of inputs, empty inputs, long inputs, their sum, then the options, in the API's order.

    Args:
        request: The parsed request.
        dialect: Limits and wordings.
        size: The dimensions of the model's own vectors.
        models: The models that exist; None accepts any.

    Raises:
        RefusedRequestError: The first check that fails.
    """
    if models is not None and request.model not in models:
        raise RefusedRequestError(_UNKNOWN_MODEL.fill(model=request.model))
    if len(request.texts) > dialect.max_inputs:
        raise RefusedRequestError(_sized(dialect.too_many, request, len(request.texts), dialect.max_inputs))
    if not request.texts or not all(request.texts):
        raise RefusedRequestError(INVALID_INPUT)
    _check_tokens(request, dialect)
    if request.base64 and not dialect.base64:
        raise RefusedRequestError(_NO_BASE64)
    if request.dimensions is not None and dialect.shortens:
        if not lookup(request.model).shortens:
            raise RefusedRequestError(_NO_DIMENSIONS)
        if request.dimensions > size:
            raise RefusedRequestError(_TOO_MANY_DIMENSIONS.fill(got=request.dimensions, limit=size))


def _check_tokens(request: ParsedRequest, dialect: Dialect) -> None:
    each = dialect.max_tokens_per_input
    if each is not None:
        for index, tokens in enumerate(request.counts):
            if tokens > each:
                raise RefusedRequestError(_sized(dialect.too_long, request, tokens, each, index))
    most = dialect.max_tokens_per_request
    if most is not None and request.weight > most:
        raise RefusedRequestError(_sized(dialect.too_large, request, request.weight, most))


def _sized(wording: Wording, request: ParsedRequest, got: int, limit: int, index: int = 0) -> Wording:
    return wording.fill(got=got, limit=limit, index=index, model=request.model)


@dataclass(frozen=True, slots=True)
class ServerReply:
    """A reply before it is encoded; faults alter it with `dataclasses.replace`.

    Attributes:
        request: The request that it answers.
        dimensions: The size of its vectors.
        base64: Whether they are encoded as base64.
        embeddings: The JSON of each vector: a string of base64, an array of numbers, or anything else.
        indices: The `index` of each item; None for an item without one.
        others: The keys beside `data`: `object`, `model`, `usage`.
    """

    request: ParsedRequest
    dimensions: int
    base64: bool
    embeddings: tuple[bytes, ...] = field(repr=False)
    indices: tuple[int | None, ...] = field(repr=False)
    others: Json

    def encode(self) -> bytes:
        """Return the reply's JSON."""
        # one join: each further copy of a large reply would hold the GIL for many milliseconds
        parts = [b'{"data":[']
        for index, vector in zip(self.indices, self.embeddings, strict=True):
            parts.append(b'{"object":"embedding",' if index is None else b'{"object":"embedding","index":%d,' % index)
            parts += (b'"embedding":', vector, b"},")
        if len(parts) > 1:
            parts[-1] = b"}"
        parts += (b"],", json.dumps(self.others).encode()[1:])
        return b"".join(parts)


def reply_to(request: ParsedRequest, dialect: Dialect, size: int) -> ServerReply:
    """Make the reply: vectors of the requested dimensions, else of the model's own `size`."""
    dimensions = request.dimensions if request.dimensions and dialect.shortens else size
    base64 = request.base64 if dialect.encoding is None else dialect.encoding == "base64"
    written = write_vectors(embeddings_of(request.texts, dimensions, request.model), base64=base64)
    others: Json = {"object": "list", "model": request.model}
    if dialect.usage:
        others["usage"] = {"prompt_tokens": request.tokens, "total_tokens": request.tokens}
    order = range(len(written))[:: -1 if dialect.shuffles else 1]
    return ServerReply(
        request,
        dimensions,
        base64,
        embeddings=tuple(written[index] for index in order),
        indices=tuple(index if dialect.index else None for index in order),
        others=others,
    )


def write_vectors(vectors: Vectors, *, base64: bool) -> list[bytes]:
    """Return the JSON of each row of float32[n, d]."""
    return as_base64(vectors) if base64 else as_numbers(vectors)


def error_answer(error: Wording, dialect: Dialect, headers: Mapping[str, str] | None = None) -> Answer:
    """Return an error with the dialect's JSON body."""
    body = json.dumps(dialect.error_body(error)).encode()
    return Answer(error.status, body, {**JSON, **(headers or {})})


def wrong_key(key: str) -> Wording:
    """Word a 401 as OpenAI does: it echoes the first and the last characters of the key."""
    shown = key if len(key) <= 12 else f"{key[:8]}{'*' * (len(key) - 12)}{key[-4:]}"
    return Wording(
        401,
        f"Incorrect API key provided: {shown}. You can find your API key at "
        "https://platform.openai.com/account/api-keys.",
        code="invalid_api_key",
    )


_METERS = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}


def rate_error(exceeded: Exceeded, model: str) -> Wording:
    """Word a 429 as OpenAI does (health-rec issue 103, agent-zero issue 711)."""
    where = f"for {model} in organization org-asyncembed on {_METERS[exceeded.unit]}: Limit {exceeded.limit}"
    if exceeded.wait_s is None:
        message = (
            f"Request too large {where}, Requested {exceeded.requested}. "
            "The input or output tokens must be reduced in order to run successfully."
        )
    else:
        message = (
            f"Rate limit reached {where}, Used {exceeded.used}, Requested {exceeded.requested}. "
            f"Please try again in {go_duration(exceeded.wait_s)}."
        )
    message += " Visit https://platform.openai.com/account/rate-limits to learn more."
    return Wording(429, message, type=exceeded.unit, code="rate_limit_exceeded")
