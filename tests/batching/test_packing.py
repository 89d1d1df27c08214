"""`packing`: every item once, in order, within both limits, in few batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed.batching.packing import OPEN_BATCHES, Packer, weigh
from asyncembed.models import MAX_INPUTS, MAX_TOKENS_PER_REQUEST


def pack(
    weights: Sequence[int],
    max_inputs: int = MAX_INPUTS,
    max_tokens: int = MAX_TOKENS_PER_REQUEST,
    open_batches: int = OPEN_BATCHES,
) -> list[list[int]]:
    """Return the batches of the items 0, 1, 2, …, which have these weights."""
    packer: Packer[int] = Packer(max_inputs, max_tokens, open_batches)
    full = [batch for item, weight in enumerate(weights) if (batch := packer.add(item, weight))]
    return full + packer.flush()


def check(batches: list[list[int]], weights: Sequence[int], max_inputs: int, max_tokens: int) -> None:
    assert sorted(chain.from_iterable(batches)) == list(range(len(weights)))
    for batch in batches:
        assert all(a < b for a, b in pairwise(batch))
        assert 1 <= len(batch) <= max_inputs
        assert len(batch) == 1 or sum(weights[item] for item in batch) <= max_tokens


some_limits = {"max_inputs": st.integers(1, 9), "max_tokens": st.integers(1, 50), "open_batches": st.integers(1, 9)}


@given(weights=st.lists(st.integers(0, 60)), **some_limits)
def test_every_item_is_packed_once_in_order_and_within_both_limits(
    weights: list[int], max_inputs: int, max_tokens: int, open_batches: int
) -> None:
    check(pack(weights, max_inputs, max_tokens, open_batches), weights, max_inputs, max_tokens)


@pytest.mark.parametrize("seed", range(200))
def test_any_mixture_is_packed_within_both_limits(seed: int) -> None:
    rng = random.Random(seed)
    longest = rng.choice([1, 10, 500, 8_192])
    weights = [rng.randint(1, longest) for _ in range(rng.randint(1, 3_000))]
    max_inputs, max_tokens = rng.randint(1, 2_048), rng.randint(longest, 300_000)
    check(pack(weights, max_inputs, max_tokens, rng.randint(1, 12)), weights, max_inputs, max_tokens)


@pytest.mark.parametrize(
    ("texts", "max_inputs", "requests"),
    [(1, 2_048, 1), (2_048, 2_048, 1), (2_049, 2_048, 2), (5_000, 2_048, 3), (300, 100, 3), (19_207, 2_048, 10)],
)
def test_short_texts_take_as_few_requests_as_the_limit_on_inputs_allows(
    texts: int, max_inputs: int, requests: int
) -> None:
    batches = pack([100] * texts, max_inputs)
    assert [len(batch) for batch in batches[:-1]] == [max_inputs] * (requests - 1)
    assert len(batches) == requests


def test_a_batch_is_filled_to_the_last_token_and_no_further() -> None:
    assert len(pack([8_192] * 36 + [300_000 - 36 * 8_192])) == 1
    assert len(pack([8_192] * 36 + [300_001 - 36 * 8_192])) == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_tokens", [300_000, 100_000])
@pytest.mark.parametrize("longest", [500, 2_000, 8_192])
def test_mixed_lengths_take_at_most_two_percent_more_requests_than_the_least_possible(
    seed: int, max_tokens: int, longest: int
) -> None:
    rng = random.Random(seed)
    weights = [int(longest ** rng.random()) if rng.random() < 0.5 else rng.randint(1, longest) for _ in range(30_000)]
    least = max(-(-sum(weights) // max_tokens), -(-len(weights) // MAX_INPUTS))
    assert len(pack(weights, max_tokens=max_tokens)) <= max(1.02 * least, least + 1)


@given(weights=st.lists(st.integers(0, 60)), max_inputs=st.integers(1, 9), max_tokens=st.integers(1, 50))
def test_with_one_open_batch_the_batches_are_consecutive_runs(
    weights: list[int], max_inputs: int, max_tokens: int
) -> None:
    batches = pack(weights, max_inputs, max_tokens, open_batches=1)
    assert list(chain.from_iterable(batches)) == list(range(len(weights)))


def test_the_first_batch_is_returned_when_an_item_does_not_fit() -> None:
    packer: Packer[str] = Packer(10, 100)
    assert packer.add("a", 60) is None
    assert packer.add("b", 60) == ["a"]


def test_a_batch_is_returned_when_an_item_fills_it() -> None:
    packer: Packer[str] = Packer(2, 100)
    assert packer.add("a", 1) is None
    assert packer.add("b", 1) == ["a", "b"]
    assert len(packer) == 0


def test_a_long_item_does_not_close_a_batch_for_short_ones() -> None:
    packer: Packer[str] = Packer(10, 100)
    packer.add("first", 90)
    packer.add("second", 90)  # returns the first batch; now two may be open
    assert [packer.add(name, weight) for name, weight in (("third", 90), ("fits", 10))] == [None, None]
    assert len(packer) == 3
    assert sorted(map(len, packer.flush())) == [1, 2]


def test_an_item_heavier_than_the_limit_is_a_batch_alone() -> None:
    assert sorted(pack([10, 500, 10, 101, 100], 10, 100)) == [[0], [1], [2], [3], [4]]


def test_after_a_flush_the_packer_is_empty_and_can_be_used_again() -> None:
    packer: Packer[str] = Packer(10, 100)
    packer.add("a", 1)
    assert (packer.flush(), len(packer), packer.flush()) == ([["a"]], 0, [])
    packer.add("b", 1)
    assert packer.flush() == [["b"]]


@pytest.mark.parametrize(
    ("tokens", "size_bytes", "weight"),
    [(1, 1, 1), (1, 4, 1), (1, 5, 2), (10, 40, 10), (10, 41, 11), (3, 4, 3), (0, 0, 0)],
)
def test_a_text_weighs_its_tokens_or_a_quarter_of_its_bytes_rounded_up(
    tokens: int, size_bytes: int, weight: int
) -> None:
    assert weigh(tokens, size_bytes) == weight
