"""The reasons, order and messages of refusals, and the replies to good requests. No socket."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from asyncembed.testing import (
    AZURE_INFERENCE,
    DASHSCOPE,
    DIALECTS,
    FASTAPI,
    LM_STUDIO,
    OLD_VLLM,
    OPENAI,
    OPENAI_2026,
    TEI,
    Dialect,
    embedding_of,
)
from asyncembed.testing.replies import ParsedRequest, RefusedRequestError, check, error_answer, parse_request, reply_to

MODEL = "text-embedding-3-small"
INVALID = "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."


def words(texts: Sequence[str]) -> list[int]:
    """Count a word as a token, so that tests can choose tokens and bytes separately."""
    return [text.count(" ") + 1 for text in texts]


def question(texts: object, model: object = MODEL, **options: object) -> ParsedRequest:
    return parse_request(json.dumps({"model": model, "input": texts, **options}).encode(), words)


def refusal(texts: object, dialect: Dialect = OPENAI, models: Sequence[str] | None = None, **options: object) -> Any:
    """Return status and body of the refusal; fail if the request is accepted."""
    with pytest.raises(RefusedRequestError) as caught:
        check(question(texts, **options), dialect, 1_536, models)  # type: ignore[arg-type]
    answer = error_answer(caught.value.error, dialect)
    return answer.status, json.loads(answer.body)


def accept(texts: object, dialect: Dialect = OPENAI, **options: object) -> dict[str, Any]:
    """Return the reply; fail if the request is refused."""
    asked = question(texts, **options)
    check(asked, dialect, 1_536, None)
    return dict(json.loads(reply_to(asked, dialect, 1_536).encode()))


def openai_error(
    message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> Any:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---- limits ----


def test_2048_inputs_are_accepted_and_one_more_is_refused() -> None:
    assert len(accept(["x"] * 2_048, dimensions=1)["data"]) == 2_048
    assert refusal(["x"] * 2_049) == (400, openai_error(INVALID))


def test_8192_tokens_are_accepted_and_one_more_is_refused() -> None:
    accept([" " * 8_191], dimensions=1)
    message = (
        "This model's maximum context length is 8192 tokens, however you requested 8193 tokens "
        "(8193 in your prompt; 0 for the completion). Please reduce your prompt; or completion length."
    )
    assert refusal(["x", " " * 8_192]) == (400, openai_error(message))
    wording_2026 = "Invalid 'input[1]': maximum input length is 8192 tokens."
    assert refusal(["x", " " * 8_192], OPENAI_2026) == (400, openai_error(wording_2026))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        pytest.param(" " * 2_999, 100, id="3,000 tokens in 2,999 bytes: the tokens decide"),
        pytest.param("x" * 12_000, 100, id="1 token in 12,000 bytes: bytes / 4 decide"),
        pytest.param("é" * 6_000, 100, id="bytes, not characters"),
    ],
)
def test_300000_tokens_or_bytes_by_4_are_accepted_and_more_are_refused(text: str, count: int) -> None:
    accept([text] * count, dimensions=1)
    kind = "max_tokens_per_request"
    message = "Requested 300001 tokens, max 300000 tokens per request"
    assert refusal([text] * count + ["x"]) == (400, openai_error(message, kind, kind))
    wording_2026 = "Invalid 'input': maximum request size is 300000 tokens per request."
    assert refusal([text] * count + ["x"], OPENAI_2026) == (400, openai_error(wording_2026))


def test_checks_are_made_in_the_order_count_then_empty_then_length_then_sum() -> None:
    too_long, too_many = " " * 8_192, ["x"] * 2_049
    assert refusal([*too_many, too_long], TEI)[0] == 413
    assert refusal(["", too_long]) == (400, openai_error(INVALID))
    assert "maximum context length" in refusal([" " * 8_191] * 40 + [too_long])[1]["error"]["message"]


@pytest.mark.parametrize("texts", ["", [], [""], ["x", ""], None, 5, [5.0], ["x", 5], ["x", None], {}, [[]], [["x"]]])
def test_an_empty_input_and_an_input_of_the_wrong_type_are_invalid(texts: object) -> None:
    assert refusal(texts) == (400, openai_error(INVALID))


# ---- the rest of the request ----


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"input": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RefusedRequestError, match="could not parse the JSON body") as caught:
        parse_request(body, words)
    assert caught.value.error.status == 400


@pytest.mark.parametrize("model", [None, "", 5])
def test_a_request_without_a_model_is_refused(model: object) -> None:
    assert refusal("x", model=model) == (400, openai_error("you must provide a model parameter"))


def test_an_unknown_model_is_not_found() -> None:
    message = f"The model `{MODEL}` does not exist or you do not have access to it."
    assert refusal("x", models=["another"]) == (404, openai_error(message, code="model_not_found"))


def test_dimensions_are_refused_if_the_model_cannot_shorten_or_has_fewer() -> None:
    message = "This model does not support specifying dimensions."
    assert refusal("x", model="text-embedding-ada-002", dimensions=256) == (400, openai_error(message))
    message = "Invalid value for 'dimensions' = 1537. Must be less than or equal to 1536."
    assert refusal("x", dimensions=1_537) == (400, openai_error(message, param="dimensions"))
    assert refusal("x", dimensions=0)[0] == refusal("x", dimensions="8")[0] == 400
    assert refusal("x", encoding_format="hex")[0] == 400


# ---- replies ----


def test_a_reply_has_a_vector_for_each_text_and_the_usage() -> None:
    reply = accept(["a", "b c"])
    assert reply["model"] == MODEL
    assert reply["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [item["index"] for item in reply["data"]] == [0, 1]
    assert np.array_equal(np.array(reply["data"][1]["embedding"], np.float32), embedding_of("b c"))


def test_base64_is_little_endian_float32() -> None:
    reply = accept(["a"], encoding_format="base64", dimensions=256)
    raw = base64.b64decode(reply["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(raw, "<f4"), embedding_of("a", dimensions=256))


def test_one_text_without_a_list_and_token_ids_are_accepted() -> None:
    assert len(accept("a text")["data"]) == 1
    assert accept([1, 2, 3])["usage"]["total_tokens"] == 3
    several = accept([[1, 2, 3], [4]])
    assert len(several["data"]) == 2
    assert several["usage"]["total_tokens"] == 4


# ---- dialects ----


@pytest.mark.parametrize(
    ("dialect", "texts", "status", "body"),
    [
        pytest.param(
            TEI,
            ["x"] * 33,
            413,
            {"message": "batch size 33 > maximum allowed batch size 32", "code": 413, "type": "Validation"},
            id="tei",
        ),
        pytest.param(
            FASTAPI,
            ["x"] * 1_025,
            422,
            {
                "detail": [
                    {
                        "type": "too_long",
                        "loc": ["body", "input"],
                        "msg": "Value should have at most 1024 items, not 1025",
                    }
                ]
            },
            id="fastapi",
        ),
        pytest.param(
            DASHSCOPE,
            ["x"] * 11,
            400,
            openai_error(
                "<400> InternalError.Algo.InvalidParameter: Value error, batch size is invalid, "
                "it should not be larger than 10.: input.contents",
                "InvalidParameter",
                "InvalidParameter",
            ),
            id="dashscope",
        ),
        pytest.param(
            AZURE_INFERENCE,
            ["x" * 4 * 8_000] * 9,
            413,
            {
                "error": {
                    "message": f"Request body too large for {MODEL} - Max size: 64000 tokens.",
                    "type": None,
                    "param": None,
                    "code": "tokens_limits_reached",
                }
            },
            id="azure-inference",
        ),
    ],
)
def test_other_dialects_refuse_with_their_own_messages(
    dialect: Dialect, texts: list[str], status: int, body: object
) -> None:
    assert refusal(texts, dialect) == (status, body)
    accept(texts[:-1], dialect)


def test_old_vllm_refuses_base64_and_its_body_has_no_error_key() -> None:
    status, body = refusal("x", OLD_VLLM, encoding_format="base64")
    assert status == 400
    assert (body["object"], body["code"]) == ("error", 400)
    assert body["message"] == "base64 encoding is not currently supported"
    accept("x", OLD_VLLM, encoding_format="float")


def test_a_dialect_can_ignore_encoding_and_dimensions_and_omit_usage() -> None:
    reply = accept("a", LM_STUDIO, encoding_format="base64", dimensions=8)
    assert len(reply["data"][0]["embedding"]) == 1_536
    assert "usage" not in reply
    always = accept("a", replace(OPENAI, encoding="base64"), encoding_format="float")
    assert isinstance(always["data"][0]["embedding"], str)


def test_a_dialect_can_shuffle_and_can_omit_the_index() -> None:
    shuffled = accept(["a", "b", "c"], replace(OPENAI, shuffles=True))["data"]
    assert [item["index"] for item in shuffled] == [2, 1, 0]
    assert np.array_equal(np.array(shuffled[0]["embedding"], np.float32), embedding_of("c"))
    plain = accept(["a", "b"], replace(OPENAI, index=False))["data"]
    assert not any("index" in item for item in plain)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_answers_a_short_text(name: str) -> None:
    vector = accept("a", DIALECTS[name])["data"][0]["embedding"]
    assert np.array_equal(np.array(vector, np.float32), embedding_of("a"))
