"""`batch`: what fits one request, and what becomes of the texts of a batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed.batching.batch import Batch, outcome_of_error, outcome_of_reply
from asyncembed.batching.packing import Limits
from asyncembed.batching.texts import Piece, PooledPieces, Text
from asyncembed.errors import AsyncEmbedError
from asyncembed.types import Reply


def batch_of(*weights: int) -> Batch:
    return Batch([Text(str(index), (index,), weight=weight) for index, weight in enumerate(weights)])


@pytest.mark.parametrize(
    ("weights", "fits"),
    [
        ((5, 5), True),
        ((5, 6), False),
        ((1, 1, 1), True),
        ((1, 1, 1, 1), False),
        ((11,), True),  # it cannot be made smaller
    ],
)
def test_a_batch_fits_within_both_limits_or_if_it_is_a_single_input(weights: tuple[int, ...], fits: bool) -> None:
    assert batch_of(*weights).fits(Limits(inputs=3, tokens=10, tokens_per_text=100)) is fits


@given(weights=st.lists(st.integers(1, 20), min_size=1), inputs=st.integers(1, 5), tokens=st.integers(1, 20))
def test_a_repacked_batch_keeps_all_its_inputs_in_order_and_each_part_fits(
    weights: list[int], inputs: int, tokens: int
) -> None:
    limits = Limits(inputs, tokens, tokens_per_text=100)
    batch = batch_of(*weights)
    batch.sent = True
    parts = batch.repacked(limits)
    assert [each for part in parts for each in part.inputs] == batch.inputs
    assert all(part.fits(limits) and part.sent for part in parts)


def text_in_pieces() -> tuple[Text, Batch, Batch]:
    """Return a text of two pieces, and a batch of each piece, the first one together with a short text."""
    text = Text("long text", (1,), pieces=PooledPieces(missing=2))
    first, last = (Piece(text, content, tokens=1, weight=1) for content in ("long ", "text"))
    return text, Batch([Text("short", (0,), tokens=1, weight=1), first]), Batch([last])


def reply(*rows: list[float]) -> Reply:
    return Reply(np.array(rows, np.float32), 1)


def test_a_long_text_is_delivered_with_its_last_piece() -> None:
    text, first, last = text_in_pieces()
    outcome = outcome_of_reply(first, reply([1, 2], [1, 0]))
    assert [each.content for each in outcome.texts] == ["short"]
    assert outcome.vectors.tolist() == [[1, 2]]
    outcome = outcome_of_reply(last, reply([0, 1]))
    assert (list(outcome.texts), outcome.failed) == ([text], [])
    assert outcome.vectors.tolist() == [pytest.approx([0.5**0.5, 0.5**0.5])]


def test_a_long_text_with_a_failed_piece_fails_once_with_its_last_piece() -> None:
    error = AsyncEmbedError("no")
    text, first, last = text_in_pieces()
    assert [each.content for each, _ in outcome_of_error(first, error).failed] == ["short"]
    outcome = outcome_of_reply(last, reply([0, 1]))
    assert (list(outcome.texts), list(outcome.failed)) == ([], [(text, error)])

    text, first, last = text_in_pieces()
    assert not outcome_of_reply(first, reply([1, 2], [1, 0])).failed
    assert list(outcome_of_error(last, error).failed) == [(text, error)]
