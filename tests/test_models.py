"""`models`: the known facts are right, and nothing is assumed about other models."""

from __future__ import annotations

import pytest

from asyncembed.models import MAX_INPUTS, MAX_TOKENS_PER_REQUEST, MAX_TOKENS_PER_TEXT, Model, lookup
from asyncembed.providers.local import DIMENSIONS


@pytest.mark.parametrize(
    ("name", "dimensions", "shortens", "price"),
    [
        ("text-embedding-3-small", 1_536, True, 0.02),
        ("text-embedding-3-large", 3_072, True, 0.13),
        ("text-embedding-ada-002", 1_536, False, 0.10),
    ],
)
def test_the_models_of_openai_are_known(name: str, dimensions: int, shortens: bool, price: float) -> None:
    assert lookup(name) == Model(name, dimensions, shortens, "cl100k_base", price)


def test_the_embedded_model_costs_nothing() -> None:
    assert (lookup("local").dimensions, lookup("local").usd_per_million_tokens) == (max(DIMENSIONS), 0.0)


@pytest.mark.parametrize("name", ["my-deployment", "TEXT-EMBEDDING-3-SMALL", "openai/text-embedding-3-small"])
def test_nothing_is_assumed_of_an_unknown_name(name: str) -> None:
    assert lookup(name) == Model(name, dimensions=None, shortens=True, encoding=None, usd_per_million_tokens=None)


def test_the_default_limits_are_those_of_the_api() -> None:
    assert (MAX_INPUTS, MAX_TOKENS_PER_TEXT, MAX_TOKENS_PER_REQUEST) == (2_048, 8_192, 300_000)
