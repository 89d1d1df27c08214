"""`decoding`: a reply is decoded exactly or refused; nothing in between."""

from __future__ import annotations

import base64
import json
import math
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncembed.errors import ProtocolError
from asyncembed.providers import decoding
from asyncembed.providers.decoding import Decoder, decode, most_bytes
from asyncembed.types import Vectors


def some_vectors(count: int = 3, dimensions: int = 4) -> Vectors:
    return np.random.default_rng(0).standard_normal((count, dimensions)).astype(np.float32)


def as_base64(vector: Vectors) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def as_numbers(vector: Vectors) -> list[float]:
    return [float(number) for number in vector]


Spelling = Callable[[Vectors], Any]
both = pytest.mark.parametrize("spell", [as_base64, as_numbers])


def document(vectors: Vectors, spell: Spelling = as_base64) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": spell(row)} for i, row in enumerate(vectors)],
        "model": "m",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


def refused(body: bytes, count: int = 3, dimensions: int | None = 4) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(body, count, dimensions)
    return str(caught.value)


def damaged(damage: Callable[[list[dict[str, Any]]], object], spell: Spelling = as_base64) -> bytes:
    """A reply of three vectors of four numbers, after something was done to its items."""
    reply = document(some_vectors(), spell)
    damage(reply["data"])
    return json.dumps(reply).encode()


@both
@pytest.mark.parametrize("dimensions", [4, None])
def test_a_good_reply_is_decoded_bit_by_bit(spell: Spelling, dimensions: int | None) -> None:
    vectors = some_vectors()
    reply = decode(json.dumps(document(vectors, spell)).encode(), 3, dimensions)
    assert (reply.vectors.dtype, reply.vectors.flags.c_contiguous, reply.tokens) == (np.float32, True, 7)
    assert reply.vectors.tobytes() == vectors.tobytes()


def test_base64_and_numbers_may_be_mixed_in_any_order() -> None:
    vectors = some_vectors(6)
    for numbers in range(2**6):
        reply = document(vectors)
        for i in range(6):
            if numbers >> i & 1:
                reply["data"][i]["embedding"] = as_numbers(vectors[i])
        assert (decode(json.dumps(reply).encode(), 6, 4).vectors == vectors).all()


@both
def test_the_vectors_are_in_the_order_of_the_texts_for_any_order_in_the_reply(spell: Spelling) -> None:
    vectors = some_vectors(50)
    reply = document(vectors, spell)
    np.random.default_rng(1).shuffle(reply["data"])
    assert (decode(json.dumps(reply).encode(), 50, 4).vectors == vectors).all()


@both
@pytest.mark.parametrize("layout", [{"indent": 2}, {"separators": (",", ":")}, {"indent": "\t"}])
def test_spaces_do_not_matter(spell: Spelling, layout: dict[str, Any]) -> None:
    vectors = some_vectors()
    body = json.dumps(document(vectors, spell), **layout).replace('"embedding":', '"embedding" :\r\n').encode()
    assert (decode(body, 3, 4).vectors == vectors).all()


@both
def test_without_any_index_the_order_is_that_of_the_texts(spell: Spelling) -> None:
    for absent in ("missing", None):

        def damage(data: list[dict[str, Any]], absent: str | None = absent) -> None:
            for item in data:
                del item["index"]
                if absent is None:
                    item["index"] = None

        assert (decode(damaged(damage, spell), 3, 4).vectors == some_vectors()).all()


@pytest.mark.parametrize("dimensions", [None, 4])
def test_whole_numbers_are_numbers(dimensions: int | None) -> None:
    body = b'{"data":[{"index":0,"embedding":[1,-2,3e0,0]}]}'
    assert decode(body, 1, dimensions).vectors.tolist() == [[1.0, -2.0, 3.0, 0.0]]


def test_a_zero_vector_is_a_vector() -> None:
    assert decode(json.dumps(document(np.zeros((3, 4), np.float32))).encode(), 3, 4).vectors.tolist() == [[0.0] * 4] * 3


def set_index(*indices: Any) -> Callable[[list[dict[str, Any]]], None]:
    def damage(data: list[dict[str, Any]]) -> None:
        for item, index in zip(data, indices, strict=True):
            item["index"] = index

    return damage


@both
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda data: data.pop(), "expected 3 embeddings, got 2", id="fewer"),
        pytest.param(lambda data: data.append(data[0]), "expected 3 embeddings, got 4", id="more"),
        pytest.param(lambda data: data.clear(), "expected 3 embeddings, got 0", id="none"),
        pytest.param(set_index(0, 0, 0), "from 0 to 2 once", id="all of index 0"),
        pytest.param(set_index(0, 1, 1), "from 0 to 2 once", id="index twice"),
        pytest.param(set_index(1, 2, 3), "from 0 to 2 once", id="counted from 1"),
        pytest.param(set_index(0, -1, 1), "from 0 to 2 once", id="negative index"),
        pytest.param(set_index(0, 1, 10**30), "from 0 to 2 once", id="huge index"),
        pytest.param(set_index("0", "1", "2"), "from 0 to 2 once", id="index as string"),
        pytest.param(set_index(False, True, 2), "from 0 to 2 once", id="index as bool"),
        pytest.param(set_index(0.0, 1.0, 2.0), "from 0 to 2 once", id="index as float"),
        pytest.param(set_index(0, 1, None), "from 0 to 2 once", id="index missing on some"),
        pytest.param(set_index([0], [1], [2]), "from 0 to 2 once", id="index as list"),
        pytest.param(lambda data: data.__setitem__(1, None), "objects in `data`, got null", id="null item"),
        pytest.param(lambda data: data.__setitem__(1, "x"), "objects in `data`, got a string", id="string item"),
        *(
            pytest.param(lambda data, value=value: data[1].update(embedding=value), words, id=name)
            for value, words, name in (
                (None, "got null for text 1", "null embedding"),
                ("", "got 0 bytes for text 1", "empty string"),
                ([], "got 0 for text 1", "empty list"),
                ({}, "got an object", "object embedding"),
                (0, "expected an embedding, got int", "number embedding"),
                (1, "expected an embedding, got int", "number embedding of an array's place"),
                (True, "expected an embedding, got bool", "bool embedding"),
                ([[0.0, 1.0, 2.0, 3.0]], "expected", "nested list"),
                ([0.0, 1.0], "expected 4 dimensions, got 2 for text 1", "fewer numbers"),
                ([0.0] * 8, "expected 4 dimensions, got 8 for text 1", "more numbers"),
                (["0.1"] * 4, "expected numbers", "strings for numbers"),
                ([True] * 4, "expected numbers", "bools for numbers"),
                ([0.0, None, 0.0, 0.0], "expected numbers", "null for a number"),
                ([0.0, {}, 0.0, 0.0], "expected numbers", "object for a number"),
                ([0.0, math.nan, 0.0, 0.0], "got NaN or infinity for text 1", "NaN literal"),
                ([0.0, math.inf, 0.0, 0.0], "got NaN or infinity for text 1", "Infinity literal"),
                ([0.0, -math.inf, 0.0, 0.0], "got NaN or infinity for text 1", "-Infinity literal"),
                ([0.0, 1e300, 0.0, 0.0], "got NaN or infinity for text 1", "beyond float32"),
                ([0, 10**400, 0, 0], "for text 1", "beyond float64"),
                (as_base64(np.array([0, np.nan, 0, 0])), "got NaN or infinity for text 1", "NaN bytes"),
                (as_base64(np.array([0, 0, np.inf, 0])), "got NaN or infinity for text 1", "infinite bytes"),
                (as_base64(np.zeros(3)), "expected 4 dimensions, got 3 for text 1", "fewer bytes"),
                (as_base64(np.zeros(8)), "expected 4 dimensions, got 8 for text 1", "float64, or more bytes"),
                ("AAAAAAA=", "got 5 bytes for text 1", "bytes that are no whole numbers"),
                ("AAAA", "got 3 bytes for text 1", "three bytes"),
                (as_base64(some_vectors()[1])[:-1], "expected base64", "padding missing"),
                (as_base64(some_vectors()[1]) + "=", "expected base64", "padding too long"),
                ("_-_-" * 4, "expected base64", "urlsafe alphabet"),
                (" " + as_base64(some_vectors()[1]), "expected base64", "a space in base64"),
                (as_base64(some_vectors()[1])[:8] + "\n" + as_base64(some_vectors()[1])[8:], "base64", "a line break"),
                ("é" * 8, "expected base64", "letters that are none of base64"),
                ("array 0", "expected", "the name of an array that was taken out"),
            )
        ),
        pytest.param(lambda data: data[1].pop("embedding"), "got null for text 1", id="no embedding"),
    ],
)
def test_a_damaged_reply_is_refused(spell: Spelling, damage: Callable[[Any], object], words: str) -> None:
    assert words in refused(damaged(damage, spell))


@both
def test_ragged_vectors_are_refused_when_no_size_is_known(spell: Spelling) -> None:
    body = damaged(lambda data: data[2].update(embedding=spell(np.zeros(5, np.float32))), spell)
    assert refused(body, dimensions=None) == "expected 4 dimensions, got 5 for text 2"


@both
def test_more_or_fewer_dimensions_than_asked_for_are_refused(spell: Spelling) -> None:
    body = json.dumps(document(some_vectors(3, 4), spell)).encode()
    assert refused(body, dimensions=2) == "expected 2 dimensions, got 4 for text 0"
    assert refused(body, dimensions=8) == "expected 8 dimensions, got 4 for text 0"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"17",
        b"<html>200 OK</html>",
        b'{"data":null}',
        b'{"data":{}}',
        b'{"data":"x"}',
        b'{"error":{"message":"x"}}',
        b'{"data":[]',
        b"\xff\xfe",
        b'{"data":[{"embedding":"\xff"}]}',
        b'{"data":[{"embedding":[1,2,3,4',
        b'{"data":[{"embedding":[',
        b'"embedding":[',
        b"[" * 100_000,
        b'{"data":' * 100_000,
        b'{"data":[{"embedding":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        b'{"data":' + b"9" * 5_000 + b"}",
        b'{"data":[{"index":' + b"9" * 5_000 + b',"embedding":[1,2,3,4]}]}',
        b'{"data":[{"embedding":[1,' + b"9" * 5_000 + b",3,4]}]}",
        b'{"data":[{"embedding":[1,,3,4]}]}',
        b'{"data":[{"embedding":[1 2,3,4]}]}',
        b'{"data":[{"embedding":[01,2,3,4]}]}',
        b'{"data":[{"embedding":[nan,2,3,4]}]}',
    ],
    ids=lambda body: f"{body[:28].decode(errors='replace')} of {len(body)}",
)
def test_bytes_that_are_no_reply_are_refused(body: bytes) -> None:
    refused(body, 1)


def test_an_error_instead_of_data_is_reported_but_not_quoted() -> None:
    message = refused(b'{"error":{"message":"the canary text is refused"}}')
    assert message == "expected an object with a list `data`, got an object without it but `error`"


@pytest.mark.parametrize(
    "body",
    [
        b'{"data":[{"index":0,"embedding":[1,2],"embedding":[3,4]}]}',
        b'{"data":[{"index":0,"embedding":"AAAAAAAAAAA=","embedding":[3,4]}]}',
        b'{"data":[{"index":0,"embedding":[3,4]}],"data":[{"index":0,"embedding":[5,6]}]}',
    ],
)
def test_two_values_for_one_key_are_refused(body: bytes) -> None:
    refused(body, 1, 2)


def test_arrays_elsewhere_in_the_reply_are_not_taken_for_vectors() -> None:
    vector = b'{"index":0,"embedding":[1,2],"note":"\\"embedding\\":[9,9]"}'
    body = b'{"embedding":[7,8],"data":[' + vector + b'],"more":{"embedding":[5,6]}}'
    assert decode(body, 1, 2).vectors.tolist() == [[1.0, 2.0]]
    assert "got int" in refused(b'{"embedding":[7,8],"data":[{"index":0,"embedding":0}]}', 1, 2)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"total_tokens": 5, "prompt_tokens": 4}, 5),
        ({"prompt_tokens": 4}, 4),
        ({"total_tokens": 0}, 0),
        ({"total_tokens": "5", "prompt_tokens": 4}, 4),
        ({"total_tokens": -1}, None),
        ({"total_tokens": True}, None),
        ({"total_tokens": 5.0}, None),
        ({"total_tokens": 10**30}, None),
        ({}, None),
        (None, None),
        ([5], None),
        ("5", None),
    ],
)
def test_usage_is_read_or_else_unknown(usage: object, tokens: int | None) -> None:
    reply = document(some_vectors())
    reply["usage"] = usage
    assert decode(json.dumps(reply).encode(), 3, 4).tokens == tokens


def test_a_reply_may_leave_out_all_but_the_vectors() -> None:
    body = json.dumps({"data": [{"embedding": as_numbers(row)} for row in some_vectors()]}).encode()
    reply = decode(body, 3, None)
    assert (reply.vectors == some_vectors()).all()
    assert reply.tokens is None


def test_float64_in_base64_is_detected_even_if_no_size_is_known() -> None:
    def as_double(vector: Vectors) -> str:
        return base64.b64encode(vector.astype("<f8").tobytes()).decode()

    body = json.dumps(document(some_vectors(2, 64), as_double)).encode()
    assert refused(body, 2, None) == "expected float32 in base64, got float64"
    assert refused(body, 2, 64) == "expected 64 dimensions, got 128 for text 0"


@pytest.mark.parametrize("dimensions", [1, 2, 64, 65])
def test_vectors_of_few_values_are_not_taken_for_float64(dimensions: int) -> None:
    one_hot = np.eye(dimensions, dtype=np.float32)
    signs = np.where(np.random.default_rng(0).random((dimensions, dimensions)) < 0.5, -1, 1).astype(np.float32)
    for vectors in (one_hot, signs, np.zeros_like(one_hot)):
        assert (decode(json.dumps(document(vectors)).encode(), dimensions, None).vectors == vectors).all()


@pytest.mark.parametrize("dimensions", [1, 4, 256, 1_536, 8_192])
def test_the_longest_valid_reply_is_within_the_limit_of_bytes(dimensions: int) -> None:
    longest = np.full((8, dimensions), -1.2345678901234567e-38)
    reply = document(longest, lambda row: [float(number) for number in row])
    for item in reply["data"]:
        item["object"] = "embedding" * 10
    size = len(json.dumps(reply, indent=1).encode()) - 8 * dimensions * 3  # less the indent of every number
    assert size < most_bytes(8, dimensions) <= most_bytes(8, None)


GOOD = {spell: json.dumps(document(some_vectors(), spell)).encode() for spell in (as_base64, as_numbers)}


@settings(deadline=None, max_examples=500)
@example(spell=as_numbers, at=0.5, cut=0, put=b"")
@given(
    spell=st.sampled_from([as_base64, as_numbers]),
    at=st.floats(0, 1),
    cut=st.integers(0, 40),
    put=st.binary(max_size=6)
    | st.sampled_from([b"null", b"[", b"]", b'"', b"NaN", b"true", b'"embedding":[1,2,3,4],']),
)
def test_a_reply_with_any_byte_changed_is_read_literally_or_refused(
    spell: Spelling, at: float, cut: int, put: bytes
) -> None:
    good = GOOD[spell]
    start = int(at * len(good))
    body = good[:start] + put + good[start + cut :]
    try:
        reply = decode(body, 3, 4)
    except ProtocolError:
        return
    # The same bytes, read by Python's own slow and careful parser.
    said: list[Vectors] = [np.empty(0, np.float32)] * 3
    items = json.loads(body)["data"]
    for position, item in enumerate(items):
        value = item["embedding"]
        raw = (
            np.frombuffer(base64.b64decode(value, validate=True), "<f4") if isinstance(value, str) else np.array(value)
        )
        index = item.get("index")
        said[position if index is None else index] = raw.astype(np.float32)
    assert reply.vectors.tolist() == [row.tolist() for row in said]
    assert np.isfinite(reply.vectors).all()


@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode(errors="ignore")))
def test_no_bytes_break_the_decoder(body: bytes) -> None:
    refused(body, 1, None)


@both
@pytest.mark.parametrize("layout", [{"indent": 2}, {"separators": (",", ":")}])
@pytest.mark.parametrize("dimensions", [4, 12])  # of which 12 fill their base64, so that they are decoded together
def test_a_reply_is_the_same_in_pieces_of_any_size(spell: Spelling, layout: dict[str, Any], dimensions: int) -> None:
    vectors = some_vectors(5, dimensions)
    body = json.dumps(document(vectors, spell), **layout).encode()
    for size in range(1, len(body) + 1):
        decoder = Decoder(5, dimensions)
        for start in range(0, len(body), size):
            decoder.feed(memoryview(body)[start : start + size])
        assert decoder.size == len(body)
        assert (decoder.finish().vectors == vectors).all()


ALIKE = some_vectors(6, 12)


@pytest.mark.parametrize("position", [0, 1, 3, 5])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (as_base64(ALIKE[0])[:-1] + "=", "got 47 bytes"),
        (as_base64(ALIKE[0])[:-2] + "==", "got 46 bytes"),
        ("=" * 64, "expected base64"),
        ("A" * 31 + "=" + "A" * 32, "expected base64"),
        ("-" * 64, "expected base64"),
        (as_base64(ALIKE[0])[:48], "expected 12 dimensions, got 9"),
        (as_base64(np.full(12, np.inf)), "got NaN or infinity"),
        ("", "got 0 bytes"),
    ],
)
def test_the_bad_one_of_several_vectors_is_named(value: str, words: str, position: int) -> None:
    reply = document(ALIKE)
    reply["data"][position]["embedding"] = value
    message = refused(json.dumps(reply).encode(), 6, 12)
    assert words in message
    assert message.endswith(f"for text {position}")


@pytest.mark.parametrize("count", [5, 7])
def test_the_number_of_vectors_must_be_the_number_of_texts(count: int) -> None:
    assert f"expected {count} embeddings, got 6" in refused(json.dumps(document(ALIKE)).encode(), count, 12)


def test_slashes_may_be_escaped_as_php_does() -> None:
    for vectors in (some_vectors(200), some_vectors(200, 12)):
        body = json.dumps(document(vectors)).replace("/", "\\/").encode()
        assert body.count(b"\\/") > 50
        assert (decode(body, 200, None).vectors == vectors).all()
    assert "expected base64" in refused(body.replace(b"\\/", b"\\n"), 200, None)


@both
def test_vectors_elsewhere_in_the_reply_change_nothing(spell: Spelling) -> None:
    vectors = some_vectors()
    other = spell(np.ones(7, np.float32))
    reply = {"embedding": other, **document(vectors, spell), "more": [{"embedding": other}]}
    for dimensions in (4, None):
        assert (decode(json.dumps(reply).encode(), 3, dimensions).vectors == vectors).all()


@pytest.mark.parametrize("vector", [b'""', b'"AAAA"', b"[1]", b"[]"])
def test_a_flood_of_vectors_takes_no_more_memory_than_its_bytes(vector: bytes) -> None:
    body = b'{"data":[' + b",".join([b'{"embedding":%b}' % vector] * 20_000) + b"]}"
    decoder = Decoder(3, 1)
    tracemalloc.start()
    try:
        for start in range(0, len(body), 100_000):
            decoder.feed(body[start : start + 100_000])
        assert tracemalloc.get_traced_memory()[0] < 2 * len(body)
    finally:
        tracemalloc.stop()
    with pytest.raises(ProtocolError, match="expected 3 embeddings, got 20000"):
        decoder.finish()


@pytest.mark.parametrize("blanks", [1, 16, 17, 1_000])
def test_base64_is_found_after_any_number_of_blanks(blanks: int) -> None:
    vectors = some_vectors()
    body = json.dumps(document(vectors)).replace('"embedding": "', '"embedding":' + blanks * " " + '"').encode()
    assert (decode(body, 3, None).vectors == vectors).all()


def test_a_key_may_be_spelled_with_escapes() -> None:
    vectors = some_vectors()
    body = json.dumps(document(vectors)).replace('"embedding": "', '"\\u0065mbedding": "').encode()
    assert (decode(body, 3, None).vectors == vectors).all()


@pytest.mark.parametrize("name", ["vector 0", "vector 1", "vector 2"])
@both
def test_the_placeholder_of_a_vector_is_not_accepted_as_a_vector(spell: Spelling, name: str) -> None:
    assert "expected base64" in refused(damaged(lambda data: data[1].update(embedding=name), spell))
    hidden = damaged(lambda data: data[1].update(embedding=name), spell).replace(
        f'"embedding": "{name}"'.encode(), f'"\\u0065mbedding": "{name}"'.encode()
    )
    refused(hidden)


def test_an_impossible_size_is_refused_before_memory_is_allocated() -> None:
    too_long = base64.b64encode(bytes(4 * (decoding.MAX_DIMENSIONS + 1))).decode()
    body = json.dumps({"data": [{"embedding": too_long}]}).encode()
    assert refused(body, 1, None) == "expected 1 to 16,384 dimensions, got 16,385 for text 0"
    assert "dimensions, got 0" in refused(b'{"data":[{"embedding":[]}]}', 1, None)


def test_only_the_text_between_vectors_is_kept() -> None:
    vectors = some_vectors(100, 1_536)
    body = json.dumps(document(vectors)).encode()
    decoder = Decoder(100, 1_536)
    tracemalloc.start()
    try:
        for start in range(0, len(body), 4_096):
            decoder.feed(body[start : start + 4_096])
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < vectors.nbytes + len(body) / 10
    assert (decoder.finish().vectors == vectors).all()


def test_a_profiler_that_keeps_frames_does_not_break_decoding() -> None:
    vectors = np.arange(40, dtype=np.float32).reshape(10, 4)
    body = json.dumps(document(vectors)).encode()
    frames: list[Any] = []
    sys.setprofile(lambda frame, event, _: frames.append(frame))
    try:
        decoder = Decoder(10, None)
        for start in range(0, len(body), 100):
            decoder.feed(body[start : start + 100])
        reply = decoder.finish()
    finally:
        sys.setprofile(None)
    np.testing.assert_array_equal(reply.vectors, vectors)
