"""The servers that can be imitated: their limits, error messages and shapes of replies. Values only.

Sources are error messages quoted in public issue threads, named beside each value, read 2026-08 to 2026-11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from ..models import MAX_INPUTS, MAX_TOKENS_PER_REQUEST, MAX_TOKENS_PER_TEXT

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wording:
    """An error: status, message with `{got}`, `{limit}`, `{index}` and `{model}` as placeholders, type, code, param."""

    status: int
    message: str
    type: str | None = "invalid_request_error"
    code: str | None = None
    param: str | None = None

    def fill(self, **values: object) -> Wording:
        """Return the wording with its placeholders filled in."""
        return replace(self, message=self.message.format(**values))


def openai_body(error: Wording) -> Json:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def vllm_body(error: Wording) -> Json:
    """vLLM's body before 0.10: no `error` key around it, and the status as code (vllm issue 6174)."""
    return {
        "object": "error",
        "message": error.message,
        "type": "BadRequestError" if error.status == 400 else error.type,
        "param": error.param,
        "code": error.status,
    }


def tei_body(error: Wording) -> Json:
    """The body of Text Embeddings Inference on `/v1/embeddings` (coze-studio issue 455)."""
    return {"message": error.message, "code": error.status, "type": error.type}


def fastapi_body(error: Wording) -> Json:
    """FastAPI's validation error: a list under `detail`, without an `error` key (litellm issue 32528)."""
    return {"detail": [{"type": error.type, "loc": ["body", "input"], "msg": error.message}]}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of server answers. Make your own from one of these with `dataclasses.replace`.

    Attributes:
        max_inputs: Limit of inputs per request.
        max_tokens_per_input: Limit of tokens per input; None for no limit.
        max_tokens_per_request: Limit for all inputs together, in tokens and in bytes / 4; None for no limit.
        too_many: The error for too many inputs.
        too_long: The error for an input that is too long.
        too_large: The error for a request with too many tokens.
        error_body: Makes the JSON of an error.
        encoding: The encoding of all vectors; None sends the encoding that was requested.
        base64: Whether base64 is supported; if not, a request for it is refused.
        shortens: Whether `dimensions` is obeyed; if not, it is ignored.
        index: Whether the items of a reply have an `index`.
        usage: Whether a reply has `usage`.
        shuffles: Whether the items of a reply are in another order than the inputs.
        rate_headers: Whether `x-ratelimit-…` headers are sent.
        retry_after: Whether a 429 has `retry-after-ms` and `retry-after` headers.
    """

    max_inputs: int
    max_tokens_per_input: int | None
    max_tokens_per_request: int | None
    too_many: Wording
    too_long: Wording
    too_large: Wording
    error_body: Callable[[Wording], Json] = openai_body
    encoding: Literal["float", "base64"] | None = None
    base64: bool = True
    shortens: bool = True
    index: bool = True
    usage: bool = True
    shuffles: bool = False
    rate_headers: bool = True
    retry_after: bool = True


# An empty text, an empty list and too many inputs are refused in the same words (mteb issue 1200).
INVALID_INPUT = Wording(
    400, "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
)

# Lengths: JMTEB issue 15, tiktoken issue 366. Sum: gpt-researcher issue 1524, spiceai issue 6142.
OPENAI = Dialect(
    max_inputs=MAX_INPUTS,
    max_tokens_per_input=MAX_TOKENS_PER_TEXT,
    max_tokens_per_request=MAX_TOKENS_PER_REQUEST,
    too_many=INVALID_INPUT,
    too_long=Wording(
        400,
        "This model's maximum context length is {limit} tokens, however you requested {got} tokens "
        "({got} in your prompt; 0 for the completion). Please reduce your prompt; or completion length.",
    ),
    too_large=Wording(
        400,
        "Requested {got} tokens, max {limit} tokens per request",
        type="max_tokens_per_request",
        code="max_tokens_per_request",
    ),
)

# dim0 issue 143, stash issue 268; grepai issue 214.
OPENAI_2026 = replace(
    OPENAI,
    too_long=Wording(400, "Invalid 'input[{index}]': maximum input length is {limit} tokens."),
    too_large=Wording(400, "Invalid 'input': maximum request size is {limit} tokens per request."),
)

# The limit of inputs was once 1, then 16, and is 2,048 (azure-openai-proxy issue 7).
AZURE = replace(
    OPENAI,
    too_many=Wording(400, "Too many inputs. The max number of inputs is {limit}.", type=None),
)

# An endpoint for models hosted on Azure: NLWeb issue 164.
AZURE_INFERENCE = replace(
    OPENAI,
    max_tokens_per_request=64_000,
    too_large=Wording(
        413,
        "Request body too large for {model} - Max size: {limit} tokens.",
        type=None,
        code="tokens_limits_reached",
    ),
)

# 32 inputs by default, refused with 413 (TEI issue 378, coze-studio issue 455).
TEI = Dialect(
    max_inputs=32,
    max_tokens_per_input=512,
    max_tokens_per_request=None,
    too_many=Wording(413, "batch size {got} > maximum allowed batch size {limit}", type="Validation"),
    too_long=Wording(
        413,
        "Input validation error: `inputs` must have less than {limit} tokens. Given: {got}",
        type="Validation",
    ),
    too_large=INVALID_INPUT,
    error_body=tei_body,
    shortens=False,
    rate_headers=False,
    retry_after=False,
)

# vllm issues 6174 and 26248: refuses base64, and its error body has no `error` key.
OLD_VLLM = Dialect(
    max_inputs=MAX_INPUTS,
    max_tokens_per_input=8_192,
    max_tokens_per_request=None,
    too_many=INVALID_INPUT,
    too_long=Wording(
        400,
        "This model's maximum context length is {limit} tokens. However, you requested {got} tokens in the "
        "input for embedding generation. Please reduce the length of the input.",
    ),
    too_large=INVALID_INPUT,
    error_body=vllm_body,
    base64=False,
    rate_headers=False,
    retry_after=False,
)

# A provider behind LiteLLM: litellm issue 32528; DeepInfra did the same: langchain issue 21188.
FASTAPI = Dialect(
    max_inputs=1_024,
    max_tokens_per_input=8_192,
    max_tokens_per_request=None,
    too_many=Wording(422, "Value should have at most {limit} items, not {got}", type="too_long"),
    too_long=Wording(422, "Value should have at most {limit} tokens, not {got}", type="too_long"),
    too_large=INVALID_INPUT,
    error_body=fastapi_body,
    rate_headers=False,
    retry_after=False,
)

# memobase issue 142.
DASHSCOPE = replace(
    OPENAI,
    max_inputs=10,
    too_many=Wording(
        400,
        "<400> InternalError.Algo.InvalidParameter: Value error, batch size is invalid, "
        "it should not be larger than {limit}.: input.contents",
        type="InvalidParameter",
        code="InvalidParameter",
    ),
)

# Ignores `encoding_format` and sends numbers (lmstudio-bug-tracker issue 756); so did Ollama and SGLang.
LM_STUDIO = replace(
    OPENAI,
    max_tokens_per_request=None,
    encoding="float",
    shortens=False,
    usage=False,
    rate_headers=False,
    retry_after=False,
)

DIALECTS: Mapping[str, Dialect] = {
    "openai": OPENAI,
    "openai-2026": OPENAI_2026,
    "azure": AZURE,
    "azure-inference": AZURE_INFERENCE,
    "tei": TEI,
    "old-vllm": OLD_VLLM,
    "fastapi": FASTAPI,
    "dashscope": DASHSCOPE,
    "lm-studio": LM_STUDIO,
}
"""All dialects by name, for the command line."""
