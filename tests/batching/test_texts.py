"""`texts`: texts are checked, counted and cut, exactly to the token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncembed.batching.packing import Limits, weigh
from asyncembed.batching.texts import Input, PooledPieces, Text, TooLong, fit_one_request, prepare_inputs, unique
from asyncembed.batching.tokens import ByteBound, TokenCounter, ToktokCounter
from asyncembed.errors import AsyncEmbedError, InvalidTextError, TooLongError
from asyncembed.models import MAX_INPUTS, MAX_TOKENS_PER_REQUEST, MAX_TOKENS_PER_TEXT
from asyncembed.types import check_text

OPENAI = Limits(MAX_INPUTS, MAX_TOKENS_PER_REQUEST, MAX_TOKENS_PER_TEXT)
EXACT = ToktokCounter("cl100k_base")


class NoCounter(ByteBound):
    """Fails the test if anything is counted."""

    exact = True

    def count(self, texts: Sequence[str]) -> list[int]:
        assert not texts, "counted what bytes decide"
        return []


def weigh_one(
    text: str, *, counter: TokenCounter = EXACT, limits: Limits = OPENAI, too_long: TooLong = "error"
) -> tuple[list[Input], list[tuple[Text, AsyncEmbedError]]]:
    return prepare_inputs(unique([(0, text)]), counter, limits, too_long)


@pytest.mark.parametrize("text", [" ", "\n", "\0", "a", "é", "😀", "<|endoftext|>", "null"])
def test_all_other_texts_are_accepted(text: str) -> None:
    check_text(text)
    (item,), failed = weigh_one(text)
    assert (item.content, failed) == (text, [])


def test_duplicate_texts_become_one_text_with_all_positions() -> None:
    texts = unique(enumerate(["a", "b", "a", "A", "b", "a "]))
    assert [(text.content, list(text.indices)) for text in texts] == [
        ("a", [0, 2]),
        ("b", [1, 4]),
        ("A", [3]),
        ("a ", [5]),
    ]


def tokens_of(count: int) -> str:
    text = " a" * count
    assert EXACT.count([text]) == [count]
    return text


def test_a_text_at_the_models_token_limit_is_accepted_and_one_token_more_is_refused() -> None:
    (item,), failed = weigh_one(tokens_of(8_192))
    assert (item.tokens, failed) == (8_192, [])

    items, ((_, error),) = weigh_one(tokens_of(8_193))
    assert isinstance(error, TooLongError)
    assert (items, error.tokens, error.limit) == ([], 8_193, 8_192)
    assert str(error).startswith("has 8,193 tokens; the model takes 8,192.")


def test_a_text_at_the_token_limit_of_a_batch_is_accepted_and_one_token_more_is_refused() -> None:
    limits = Limits(10, 1_000, 8_192)
    (item,), failed = weigh_one(tokens_of(1_000), limits=limits)
    assert (item.weight, failed) == (1_000, [])
    items, ((_, error),) = weigh_one(tokens_of(1_001), limits=limits)
    assert (items, str(error).partition(".")[0]) == ([], "has a weight of 1,001 tokens; a batch takes 1,000")


def test_a_text_weighs_its_tokens_or_a_quarter_of_its_bytes() -> None:
    (spaces,), _ = weigh_one(" " * 1_001)
    (emoji,), _ = weigh_one("🏳️‍🌈")
    assert (spaces.tokens < 20, spaces.weight) == (True, 251)
    assert emoji.weight == emoji.tokens > len("🏳️‍🌈".encode()) / 4


def test_a_text_that_is_certainly_too_long_is_not_counted() -> None:
    items, ((_, error),) = weigh_one("a" * 5_000_000, counter=NoCounter())
    assert isinstance(error, TooLongError)
    assert (items, error.tokens) == ([], -(-5_000_000 // 128))
    assert str(error).startswith("has at least 39,063 tokens; the model takes 8,192.")


def test_a_million_spaces_and_a_letter_fit() -> None:
    (item,), failed = weigh_one(" " * 1_000_000 + "x")
    assert (item.weight, failed) == (250_001, [])


def test_failures_and_inputs_keep_their_texts_and_their_order() -> None:
    texts = unique(enumerate(["a", tokens_of(8_193), "b", "a" * 2_000_000, "c"]))
    items, failed = prepare_inputs(texts, EXACT, OPENAI, "error")
    assert [item.text for item in items] == [texts[0], texts[2], texts[4]]
    assert [text for text, _ in failed] == [texts[1], texts[3]]


def test_without_a_tokenizer_only_texts_that_cannot_fit_are_refused() -> None:
    (item,), failed = weigh_one("word " * 6_000, counter=ByteBound())
    assert (item.tokens, item.weight, failed) == (30_000, 8_192, [])
    (item,), failed = weigh_one("x" * 4_000, counter=ByteBound(), limits=Limits(10, 1_000, 8_192))
    assert (item.content, failed) == ("x" * 4_000, [])

    for text, limits in (("a" * (8_192 * 128 + 1), OPENAI), ("x" * 4_001, Limits(10, 1_000, 8_192))):
        items, ((_, error),) = weigh_one(text, counter=ByteBound(), limits=limits)
        assert (items, type(error)) == ([], TooLongError)


some_text = st.lists(
    st.sampled_from(["a", " the", "日本", "😀", " ", "\n", "é", "<|endoftext|>", "0", "'s", "\u0301"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    min_size=1,
    max_size=60,
).map("".join)


@settings(deadline=None)
@given(text=some_text.filter(bool), limit=st.integers(5, 40), exact=st.booleans())
def test_the_pieces_of_a_long_text_join_to_the_text_and_each_of_them_fits(text: str, limit: int, exact: bool) -> None:
    counter: TokenCounter = EXACT if exact else ByteBound()
    limits = Limits(10, 1_000, limit)

    pieces, failed = weigh_one(text, counter=counter, limits=limits, too_long="mean")
    beginning, _ = weigh_one(text, counter=counter, limits=limits, too_long="truncate")

    assert failed == []
    assert "".join(piece.content for piece in pieces) == text
    assert counter.count([piece.content for piece in pieces]) == [piece.tokens for piece in pieces]
    assert all(piece.tokens <= limit for piece in pieces)
    assert [item.content for item in beginning] == [pieces[0].content]
    mean = pieces[0].text.pieces
    assert (mean.missing if mean else 1) == len(pieces)
    assert beginning[0].text.pieces is None


@settings(deadline=None)
@given(
    contents=st.lists(some_text.filter(bool), min_size=1, max_size=6),
    inputs=st.integers(1, 6),
    tokens=st.integers(1, 2_000),
    tokens_per_text=st.integers(1, 1_000),
)
def test_texts_that_surely_fit_one_request_do_fit_it(
    contents: list[str], inputs: int, tokens: int, tokens_per_text: int
) -> None:
    texts, limits = unique(enumerate(contents)), Limits(inputs, tokens, tokens_per_text)
    if fit_one_request(texts, limits):
        assert len(texts) <= limits.inputs
        assert sum(text.weight for text in texts) <= limits.tokens
        for text, count in zip(texts, EXACT.count([text.content for text in texts]), strict=True):
            assert count <= min(text.tokens, limits.tokens_per_text)
            assert weigh(count, len(text.content.encode())) <= text.weight


@pytest.mark.parametrize(
    ("contents", "fit"),
    [
        pytest.param(["a" * 25] * 10, True, id="at both limits of tokens"),
        pytest.param(["a" * 26], False, id="a text that may be too long"),
        pytest.param(["a" * 25] * 9 + ["b" * 25, "c"], False, id="texts that may be too heavy"),
        pytest.param(list("abcdefghijk"), False, id="too many texts"),
    ],
)
def test_four_bytes_a_character_decide_whether_texts_surely_fit_one_request(contents: list[str], fit: bool) -> None:
    texts = [Text(content, (index,)) for index, content in enumerate(contents)]
    assert fit_one_request(texts, Limits(inputs=10, tokens=1_000, tokens_per_text=100)) is fit


@pytest.mark.parametrize("text", ["a" * 100_000, "😀" * 20_000, "word " * 20_000, "é" * 50_000])
def test_long_runs_are_cut_to_full_pieces(text: str) -> None:
    pieces, _ = weigh_one(text, too_long="mean")
    assert "".join(piece.content for piece in pieces) == text
    assert all(8_180 <= piece.tokens <= 8_192 for piece in pieces[:-1])
    (beginning,), _ = weigh_one(text, too_long="truncate")
    assert beginning.content == pieces[0].content


def test_pieces_fit_a_batch_that_holds_less_than_the_model_takes() -> None:
    pieces, failed = weigh_one(tokens_of(2_500), limits=Limits(10, 1_000, 8_192), too_long="mean")
    assert ([piece.weight for piece in pieces], failed) == ([1_000, 1_000, 500], [])


def test_a_mean_is_weighted_by_tokens_and_of_unit_length() -> None:
    mean = PooledPieces(missing=2)
    mean.add(np.array([1, 0], np.float32), 3)
    mean.add(np.array([0, 1], np.float32), 4)
    assert (mean.missing, mean.vector().dtype) == (0, np.float32)
    assert mean.vector().tolist() == [pytest.approx(3 / 5), pytest.approx(4 / 5)]


def test_a_mean_does_not_depend_on_the_order_of_its_pieces() -> None:
    random = np.random.default_rng(0)
    vectors, weights = random.standard_normal((100, 64)).astype(np.float32), random.integers(1, 8_192, 100)
    means = []
    for order in (range(100), reversed(range(100)), random.permutation(100)):
        mean = PooledPieces(missing=100)
        for i in order:
            mean.add(vectors[i], int(weights[i]))
        means.append(mean.vector())
    exact = (vectors.astype(np.float64) * weights[:, None]).sum(axis=0)
    for vector in means:
        assert np.abs(vector - exact / np.linalg.norm(exact)).max() < 6e-8  # half a unit in the last place


def test_pieces_that_cancel_out_give_zeros_and_huge_ones_no_infinity() -> None:
    mean = PooledPieces(missing=2)
    mean.add(np.array([1, 0], np.float32), 5)
    mean.add(np.array([-1, 0], np.float32), 5)
    assert mean.vector().tolist() == [0.0, 0.0]
    huge = PooledPieces(missing=1)
    huge.add(np.array([3e38, 0], np.float32), 8_192)
    assert huge.vector().tolist() == [1.0, 0.0]


def test_the_first_error_of_the_pieces_is_kept() -> None:
    mean, first = PooledPieces(missing=2), InvalidTextError("first")
    mean.fail(first)
    mean.fail(InvalidTextError("second"))
    assert (mean.error, mean.missing) == (first, 0)
