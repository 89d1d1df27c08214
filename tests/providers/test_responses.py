"""`responses`: a table of real HTTP answers and the errors they mean, and answers that are nonsense."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.errors import (
    AuthenticationError,
    BadRequestError,
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
from asyncembed.providers.responses import LONGEST_RETRY_AFTER_S, error_of, parse_duration_s, rates_of, scrub
from asyncembed.types import Rates


def plain(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def openai(message: str, kind: str | None = "invalid_request_error", code: str | int | None = None) -> bytes:
    return plain(error={"message": message, "type": kind, "param": None, "code": code})


def fields_of(error: ProviderError) -> dict[str, Any]:
    """The fields that are set, without those that every error has."""
    return {k: v for k, v in vars(error).items() if v is not None and k not in ("status", "code", "request_id")}


HTML = b"<html><head><title>%d</title></head><body><center>nginx</center></body></html>"
TPM = "Rate limit reached for m in organization org-x on tokens per min (TPM): Limit 1000000, Used 990000, "


# Each row: the answer as a server gave it, what it means, and what is learned from it.
@pytest.mark.parametrize(
    ("status", "body", "kind", "learned"),
    [
        # inputs and requests that were refused, in the words of real servers
        pytest.param(
            400,
            openai("'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs."),
            BadRequestError,
            {},
            id="OpenAI refuses some input",
        ),
        pytest.param(
            400,
            openai("[''] is not valid under any of the given schemas - 'input'"),
            BadRequestError,
            {},
            id="OpenAI refused some input in older words",
        ),
        pytest.param(
            400,
            openai(
                "This model's maximum context length is 8192 tokens, however you requested 8781 tokens (8781 in your "
            ),
            BadRequestError,
            {},
            id="OpenAI one text too long, old words",
        ),
        pytest.param(
            400,
            openai("Invalid 'input[0]': maximum input length is 8192 tokens."),
            BadRequestError,
            {},
            id="OpenAI one text too long, 2026 words",
        ),
        pytest.param(
            400,
            openai(
                "Requested 416735 tokens, max 300000 tokens per request",
                "max_tokens_per_request",
                "max_tokens_per_request",
            ),
            TooLargeError,
            {"max_tokens": 300_000, "requested_tokens": 416_735},
            id="OpenAI request too large, old words",
        ),
        pytest.param(
            400,
            openai("Invalid 'input': maximum request size is 300000 tokens per request."),
            TooLargeError,
            {"max_tokens": 300_000},
            id="OpenAI request too large, 2026 words",
        ),
        pytest.param(
            400,
            openai(
                "Invalid 'input': array too long. Expected an array with maximum length 2048, but got an array with "
                "length 2049 instead.",
                code="array_above_max_length",
            ),
            TooLargeError,
            {"max_inputs": 2_048},
            id="OpenAI too many inputs",
        ),
        pytest.param(
            400,
            openai("This model does not support specifying dimensions."),
            RequestError,
            {},
            id="OpenAI dimensions for a model without",
        ),
        pytest.param(
            400,
            openai("Invalid value for 'dimensions' = 5000. Must be less than or equal to 1536."),
            RequestError,
            {},
            id="OpenAI dimensions out of range",
        ),
        pytest.param(
            401,
            openai("Incorrect API key provided: sk-pro****1234.", code="invalid_api_key"),
            AuthenticationError,
            {},
            id="wrong key",
        ),
        pytest.param(
            403,
            openai("Country, region, or territory not supported", "x", "unsupported_country_region_territory"),
            PermissionDeniedError,
            {},
            id="wrong country",
        ),
        pytest.param(
            404,
            openai("The model `x` does not exist or you do not have access to it.", code="model_not_found"),
            NotFoundError,
            {},
            id="unknown model",
        ),
        pytest.param(404, plain(detail="Not Found"), NotFoundError, {}, id="wrong path, FastAPI"),
        pytest.param(404, b"404 page not found", NotFoundError, {}, id="wrong path, Go"),
        pytest.param(
            404, plain(error='model "x" not found, try pulling it first'), NotFoundError, {}, id="unknown model, Ollama"
        ),
        *(pytest.param(status, b"", RequestError, {}, id=f"{status} is fatal") for status in (405, 415, 501, 505, 511)),
        pytest.param(451, b"", PermissionDeniedError, {}, id="451 is fatal"),
        *(
            pytest.param(status, HTML % status, ServerError, {}, id=f"{status} may pass")
            for status in (408, 409, 424, 425, 500, 502, 503, 504, 520, 522, 525, 529, 599)
        ),
        pytest.param(
            413,
            plain(
                error={
                    "code": "tokens_limits_reached",
                    "message": "Request body too large for text-embedding-3-small model. Max size: 64000 tokens.",
                }
            ),
            TooLargeError,
            {"max_tokens": 64_000},
            id="Azure-hosted endpoint",
        ),
        pytest.param(413, HTML % 413, TooLargeError, {}, id="nginx body limit"),
        pytest.param(
            422,
            openai("Value should have at most 1024 items after validation, not 1260", code="array_above_max_length"),
            TooLargeError,
            {"max_inputs": 1_024},
            id="a provider behind LiteLLM",
        ),
        pytest.param(
            422,
            plain(
                detail=[
                    {
                        "type": "too_long",
                        "loc": ["body", "input"],
                        "msg": "List should have at most 32 items after validation, not 33",
                        "input": ["a text that must not be shown"],
                        "ctx": {"max_length": 32},
                    }
                ]
            ),
            TooLargeError,
            {"max_inputs": 32},
            id="FastAPI list of details",
        ),
        pytest.param(
            422,
            plain(detail=[{"msg": "Input should be a valid string"}]),
            BadRequestError,
            {},
            id="FastAPI other detail",
        ),
        pytest.param(
            429,
            openai(TPM + "Requested 70000. Please try again in 41.724s.", "tokens", "rate_limit_exceeded"),
            RateLimitedError,
            {"retry_after_s": 41.724},
            id="rate",
        ),
        pytest.param(
            429,
            openai(
                "Request too large for x in organization org-x on tokens per min (TPM): Limit 30000, Requested 342389. "
                "The input or output tokens must be reduced in order to run successfully.",
                "tokens",
                "rate_limit_exceeded",
            ),
            TooLargeError,
            {"max_tokens": 30_000, "requested_tokens": 342_389},
            id="a request that no waiting helps",
        ),
        pytest.param(
            429,
            openai("Rate limit reached on tokens per min (TPM): Limit 30000, Used 0, Requested 70000.", "tokens"),
            TooLargeError,
            {"max_tokens": 30_000, "requested_tokens": 70_000},
            id="a request beyond the limit, in the words of a rate",
        ),
        pytest.param(
            429, openai("Your traffic rose", "rate_limit_error", "slow_down"), RateLimitedError, {}, id="slow down"
        ),
        *(
            pytest.param(
                429, openai("You exceeded your current quota", "insufficient_quota", code), QuotaError, {}, id=code
            )
            for code in (
                "insufficient_quota",
                "credit_balance_exhausted",
                "organization_spend_limit_exceeded",
                "project_spend_limit_exceeded",
                "organization_usage_limit_exceeded",
            )
        ),
        pytest.param(429, openai("x", "insufficient_quota"), QuotaError, {}, id="money by the type alone"),
        pytest.param(400, openai("x", code="billing_hard_limit_reached"), QuotaError, {}, id="money, as 400"),
        pytest.param(402, openai("Insufficient Balance"), QuotaError, {}, id="payment required"),
        pytest.param(
            429,
            plain(
                error={
                    "code": "429",
                    "message": "Requests to the Embeddings_Create Operation under Azure OpenAI API version 2023-05-15 "
                    "have exceeded call rate limit of your current OpenAI S0 pricing tier. "
                    "Please retry after 55 seconds.",
                }
            ),
            RateLimitedError,
            {"retry_after_s": 55.0},
            id="rate, Azure",
        ),
        pytest.param(
            429,
            plain(error="Model is overloaded", error_type="overloaded"),
            RateLimitedError,
            {},
            id="overloaded, TEI",
        ),
        pytest.param(
            503,
            openai("The server is overloaded", "service_unavailable_error", "server_is_overloaded"),
            ServerError,
            {},
            id="overloaded, OpenAI 2026",
        ),
        *(
            pytest.param(status, b"", RedirectRefusedError, {}, id=f"{status} is not followed")
            for status in (301, 302, 303, 307, 308)
        ),
        *(pytest.param(status, b"", ProtocolError, {}, id=f"{status} without vectors") for status in (202, 204)),
        # an encoding or an option that a server does not have
        pytest.param(
            400,
            plain(
                object="error",
                message="base64 encoding is not currently supported",
                type="BadRequestError",
                param=None,
                code=400,
            ),
            BadRequestError,
            {},
            id="vLLM knows no base64",
        ),
        pytest.param(
            400,
            plain(
                object="error",
                message="This model's maximum context length is 8192 tokens. However, you requested 9000 tokens in the "
                "input for embedding generation.",
                code=400,
            ),
            BadRequestError,
            {},
            id="vLLM one text too long",
        ),
        pytest.param(
            500,
            openai("failed to encode response: json: unsupported value: NaN", "api_error"),
            ServerError,
            {},
            id="Ollama cannot embed a sentence",
        ),
        pytest.param(
            400,
            plain(error="the input length exceeds the context length"),
            BadRequestError,
            {},
            id="Ollama one text too long",
        ),
        pytest.param(
            400,
            openai(
                "litellm.UnsupportedParamsError: x does not support parameters: {'encoding_format': 'base64'}", None
            ),
            BadRequestError,
            {},
            id="LiteLLM knows no base64",
        ),
        pytest.param(
            413,
            plain(message="batch size 33 > maximum allowed batch size 32", code=413, type="Validation"),
            TooLargeError,
            {"max_inputs": 32},
            id="TEI too many inputs",
        ),
        pytest.param(
            422,
            plain(error="batch size 33 > maximum allowed batch size 32", error_type="Validation"),
            TooLargeError,
            {"max_inputs": 32},
            id="TEI too many inputs, as 422",
        ),
        pytest.param(
            422, plain(error="Tokenization error", error_type="Tokenizer"), BadRequestError, {}, id="TEI tokenizer"
        ),
        pytest.param(424, plain(error="Inference failed", error_type="Backend"), ServerError, {}, id="TEI backend"),
        pytest.param(
            413,
            plain(error="Input validation error: `inputs` must have less than 512 tokens. Given: 600"),
            TooLargeError,
            {},
            id="TEI one text too long",
        ),
        pytest.param(
            500,
            openai(
                "input (992 tokens) is too large to process. increase the physical batch size "
                "(current batch size: 512)",
                "server_error",
            ),
            TooLargeError,
            {},
            id="llama.cpp one text too long",
        ),
        pytest.param(
            400,
            openai(
                "<400> InternalError.Algo.InvalidParameter: Value error, batch size is invalid, it should not be "
                "larger than 10.: input.contents",
                "InvalidParameter",
                "InvalidParameter",
            ),
            TooLargeError,
            {"max_inputs": 10},
            id="DashScope",
        ),
        pytest.param(
            413,
            plain(code=20015, message="input batch size 65 > maximum allowed batch size 64", data=None),
            TooLargeError,
            {"max_inputs": 64},
            id="SiliconFlow",
        ),
        pytest.param(
            400,
            json.dumps(
                [{"error": {"code": 400, "message": "at most 100 requests can be in one batch", "status": "INVALID"}}]
            ).encode(),
            TooLargeError,
            {"max_inputs": 100},
            id="Gemini, in a list",
        ),
        pytest.param(
            429,
            plain(error={"code": 429, "message": "You exceeded your current quota. Please retry in 41.5s."}),
            RateLimitedError,
            {"retry_after_s": 41.5},
            id="Gemini words its rate like money",
        ),
        pytest.param(
            400,
            plain(
                detail="Request to model 'voyage-3' failed. The max allowed tokens per submitted batch is 120000. Your "
                "batch has 130000 tokens after truncation."
            ),
            TooLargeError,
            {"max_tokens": 120_000, "requested_tokens": 130_000},
            id="Voyage tokens",
        ),
        pytest.param(
            400,
            plain(detail="The batch size limit is 128. Your batch size is 200."),
            TooLargeError,
            {"max_inputs": 128},
            id="Voyage inputs",
        ),
        pytest.param(
            400,
            plain(object="error", message="Too many tokens overall, split into more batches.", code="3210"),
            TooLargeError,
            {},
            id="Mistral",
        ),
        pytest.param(
            400,
            openai("Too many inputs. The max number of inputs is 16. We hope to increase the number", None),
            TooLargeError,
            {"max_inputs": 16},
            id="Azure inputs",
        ),
        pytest.param(
            400,
            plain(message="invalid request: total number of texts must be at most 96 - received 97"),
            TooLargeError,
            {"max_inputs": 96},
            id="Cohere inputs",
        ),
        pytest.param(
            400, openai("x", code="invalid_api_key"), AuthenticationError, {}, id="a wrong key by its code alone"
        ),
        # unknown refusals can be split
        *(pytest.param(status, b"no", BadRequestError, {}, id=f"unknown {status}") for status in (400, 406, 418, 422)),
    ],
)
def test_an_answer_means(status: int, body: bytes, kind: type[ProviderError], learned: dict[str, Any]) -> None:
    error = error_of(status, {}, body)

    assert type(error) is kind
    assert error.status == status
    assert fields_of(error) == learned


def test_the_providers_own_code_is_kept() -> None:
    overloaded = openai("x", "service_unavailable_error", "server_is_overloaded")
    assert error_of(503, {}, overloaded).code == "server_is_overloaded"
    assert error_of(429, {}, openai("x", "rate_limit_error", "slow_down")).code == "slow_down"
    assert error_of(429, {}, plain(error="Model is overloaded", error_type="overloaded")).code == "overloaded"
    assert error_of(500, {"x-request-id": "req_1"}, b"").request_id == "req_1"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        pytest.param({"retry-after": "2"}, 2.0, id="seconds"),
        pytest.param({"retry-after": "0.3"}, 0.3, id="a fraction"),
        pytest.param({"retry-after-ms": "250"}, 0.25, id="milliseconds"),
        pytest.param({"retry-after-ms": "250", "retry-after": "3"}, 0.25, id="milliseconds win"),
        pytest.param({"retry-after-ms": "abc", "retry-after": "1"}, 1.0, id="nonsense loses"),
        pytest.param(
            {"retry-after": "Wed, 21 Oct 2026 07:28:03 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"},
            3.0,
            id="a date, by the server's clock",
        ),
        pytest.param({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None, id="a date that is past"),
        pytest.param({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, LONGEST_RETRY_AFTER_S, id="a date far ahead"),
        pytest.param({"retry-after": "86400"}, LONGEST_RETRY_AFTER_S, id="a day"),
        *(
            pytest.param({"retry-after": value}, None, id=f"retry-after {value[:12]!r} is ignored")
            for value in ("0", "-5", "nan", "inf", "1e999", "soon", "", "9" * 5_000, "Mon, 99 Foo 2026", "٣ days")
        ),
        pytest.param(
            {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0s"}, 360.0, id="until tokens are full"
        ),
        pytest.param(
            {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "17ms"},
            0.017,
            id="until requests are full",
        ),
        pytest.param(
            {"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "6m0s"}, None, id="something remains"
        ),
        pytest.param(
            {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2s", "retry-after": "1"},
            1.0,
            id="retry-after before reset",
        ),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_is_read_from_headers(status: int, headers: dict[str, str], seconds: float | None) -> None:
    error = error_of(status, headers, openai("x"))

    assert isinstance(error, (RateLimitedError, ServerError))
    assert error.retry_after_s == (None if seconds is None else pytest.approx(seconds))


def test_a_date_without_the_servers_clock_is_compared_with_the_local_clock() -> None:
    error = error_of(429, {"retry-after": "Fri, 31 Dec 9999 23:59:59 +0000"}, b"")
    assert isinstance(error, RateLimitedError)
    assert error.retry_after_s == LONGEST_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("Please try again in 6m0s.", 360.0),
        ("Please try again in 17ms. Visit", 0.017),
        ("Please try again in 1h2m3.5s.", LONGEST_RETRY_AFTER_S),
        ("Please try again in 500 milliseconds.", 0.5),
        ("Please retry after 1 second.", 1.0),
        ("please retry in 2 minutes", 120.0),
        ("try again in a moment", None),
        ("try again in 5 \u017f", None),
    ],
)
def test_the_wait_is_read_from_the_message(words: str, seconds: float | None) -> None:
    error = error_of(429, {}, openai(words))
    assert isinstance(error, RateLimitedError)
    assert error.retry_after_s == seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("17ms", 0.017),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("1m2.5s", 62.5),
        ("1h0m0s", 3_600.0),
        ("859.5us", 0.0008595),
        (" 2s ", 2.0),
        ("0s", 0.0),
        ("60", 60.0),
        ("1.5", 1.5),
        ("1770000000", None),  # seconds since 1970
        ("2026-08-01T00:00:00Z", None),  # LiteLLM's: a time
        ("-1s", None),
        ("nan", None),
        ("inf", None),
        ("s", None),
        ("1 fortnight", None),
        ("1s" * 500, None),
        ("", None),
        (None, None),
    ],
)
def test_a_duration_reads(value: str | None, seconds: float | None) -> None:
    assert parse_duration_s(value) == (None if seconds is None else pytest.approx(seconds))


def test_rates_are_read_and_nonsense_among_them_is_ignored() -> None:
    headers = {
        "x-ratelimit-limit-requests": "3000",
        "x-ratelimit-remaining-requests": "2999",
        "x-ratelimit-reset-requests": "20ms",
        "x-ratelimit-limit-tokens": "1000000",
        "x-ratelimit-remaining-tokens": "-1",
        "x-ratelimit-reset-tokens": "tomorrow",
    }
    assert rates_of(headers) == Rates(3_000, 2_999, 0.02, 1_000_000, None, None)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1e5", "9" * 30, ""])
def test_headers_without_a_limit_are_no_rates(value: str) -> None:
    assert rates_of({}) is None
    assert rates_of({"x-ratelimit-limit-requests": value, "x-ratelimit-limit-tokens": value}) is None


def test_no_key_is_shown() -> None:
    key = "a1b2c3d4e5f6canary"
    body = openai(f"Incorrect API key provided: sk-pro****1234, sk-proj-abcDEF_123; Bearer {key} is wrong, {key}")

    error = error_of(401, {}, body, secrets=[key])

    for secret in (key, "1234", "abcDEF"):
        assert secret not in str(error)
    assert "Incorrect API key provided" in str(error)


def test_only_the_sentences_of_a_list_of_details_are_shown() -> None:
    listing = plain(detail=[{"msg": "Input should be a valid string", "input": ["a canary text"]}, {"msg": "no"}])
    assert str(error_of(422, {}, listing)) == "HTTP 422: Input should be a valid string; no"


def test_secrets_that_are_very_short_do_not_garble_the_message() -> None:
    assert scrub("none of these", ["none", ""]) == "none of these"


def test_a_message_is_one_short_line() -> None:
    error = error_of(502, {}, b"<html>\r\n<body>" + b"<p>bad\n gateway</p>" * 1_000)
    assert str(error).startswith("HTTP 502: bad gateway bad gateway")
    assert len(str(error)) == 300
    assert "\n" not in str(error)


bodies = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode(errors="ignore")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["error", "message", "detail", "msg", "code", "type", "status"]), inner, max_size=4
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)
headers = st.dictionaries(
    st.sampled_from(
        [
            "retry-after",
            "retry-after-ms",
            "date",
            "x-request-id",
            *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
        ]
    ),
    st.text(max_size=50) | st.floats().map(str) | st.datetimes().map(lambda when: f"{when:%a, %d %b %Y %X} GMT"),
)


@settings(deadline=None)
@given(status=st.integers(100, 999), headers=headers, body=bodies)
def test_no_answer_raises_in_the_reader(status: int, headers: dict[str, str], body: bytes) -> None:
    error = error_of(status, headers, body, secrets=["0" * 8])

    assert isinstance(error, ProviderError)
    assert len(str(error)) < 400
    wait_s = getattr(error, "retry_after_s", None)
    assert wait_s is None or 0 < wait_s <= LONGEST_RETRY_AFTER_S
    rates_of(headers)


@pytest.mark.parametrize(
    "unit",
    [b"<", b"batch size ", b"too many inputs ", b"1 ", b"1s ", b"sk-", b"max ", b'{"error":', b"[", b"requested 1,"],
)
def test_work_on_a_hostile_body_does_not_grow_with_its_length(unit: bytes) -> None:
    def seconds(length: int) -> float:
        body = (unit * length)[:length]
        started = time.perf_counter()
        error_of(400, {}, body)
        error_of(429, {}, b"try again in " + body)
        return time.perf_counter() - started

    short = min(seconds(10_000) for _ in range(3))
    assert min(seconds(1_000_000) for _ in range(3)) < 10 * short + 0.05
