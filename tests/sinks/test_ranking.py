"""`Ranking` and `check_query`, without a store."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncembed.sinks.ranking import Ranking, check_query

from .sink_rows import nearest, row, vec


def ranked(matrix: np.ndarray, query: np.ndarray, k: int, slices: int) -> list[tuple[str, float]]:
    ids = [f"{number:04d}" for number in range(len(matrix))]
    ranking = Ranking(query, k)
    for part in np.array_split(np.arange(len(matrix)), slices):
        ranking.offer([ids[place] for place in part], matrix[part])
    return ranking.best()


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 60), st.integers(1, 7), st.integers(1, 9))
def test_any_slices_of_any_rows_give_the_k_nearest(seed: int, dimensions: int, count: int, slices: int, k: int) -> None:
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((count, dimensions)).astype(np.float32)
    query = random.standard_normal(dimensions).astype(np.float32)
    best = ranked(matrix, query, k, slices)
    expected = nearest([row(f"{number:04d}", vector) for number, vector in enumerate(matrix)], query, k)
    assert [id for id, _ in best] == expected
    assert all(-1.0 <= score <= 1.0 for _, score in best)


def test_rows_are_distinguished_even_if_their_float32_products_are_equal() -> None:
    random = np.random.default_rng(5)
    query = random.standard_normal(1_536).astype(np.float32)
    matrix = query + 1e-4 * random.standard_normal((500, 1_536)).astype(np.float32)
    expected = nearest([row(f"{number:04d}", vector) for number, vector in enumerate(matrix)], query, 5)
    assert [id for id, _ in ranked(matrix, query, 5, slices=250)] == expected


@pytest.mark.parametrize("dimensions", [1, 7, 256, 1_536, 3_072])
def test_a_vector_has_the_same_score_at_every_position(dimensions: int) -> None:
    random = np.random.default_rng(dimensions)
    vector, query = random.standard_normal((2, dimensions)).astype(np.float32)
    matrix = np.tile(vector, (999, 1))
    scores = {score for slices in (1, 2, 500) for _, score in ranked(matrix, query, 999, slices)}
    assert len(scores) == 1


def test_equal_rows_with_the_lowest_ids_are_kept_in_any_order_of_arrival() -> None:
    ranking = Ranking(vec(1, 0), 2)
    for id in ("c", "a", "d", "b"):
        ranking.offer([id], vec(2, 0).reshape(1, 2))
    assert [id for id, _ in ranking.best()] == ["a", "b"]


def test_rows_whose_float32_products_overflow_are_ranked() -> None:
    ranking = Ranking(vec(3e38, 3e38), 1)
    ranking.offer(["far"], vec(-3e38, -3e38).reshape(1, 2))
    ranking.offer(["near"], vec(3e38, 3e38).reshape(1, 2))
    assert ranking.best() == [("near", 1.0)]


def test_an_earlier_match_does_not_hide_a_slightly_better_one() -> None:
    good, better = vec(1, 1e-4), vec(1, 1e-5)
    ranking = Ranking(vec(1, 0), 1)
    ranking.offer(["good"], good.reshape(1, 2))
    ranking.offer(["better"], better.reshape(1, 2))
    assert [id for id, _ in ranking.best()] == ["better"]


def test_a_query_becomes_float32() -> None:
    assert check_query([1, 2.5], 1).dtype == np.float32
    assert check_query(np.array([1.0, 2.5]), 1).tolist() == [1.0, 2.5]
