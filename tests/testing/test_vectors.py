"""Vectors depend only on text, model and size, and both encodings are exact."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import numpy as np
import pytest

from asyncembed.testing import embedding_of
from asyncembed.testing.vectors import as_base64, as_numbers, embeddings_of

TEXTS = ["a", "b", "ä", "a ", "", "a" * 10_000, "日本語 🎉"]


def test_every_vector_is_float32_has_unit_length_and_the_models_size() -> None:
    for model, size in [("text-embedding-3-small", 1_536), ("text-embedding-3-large", 3_072), ("unknown", 1_536)]:
        vector = embedding_of("a text", model=model)
        assert vector.dtype == np.float32
        assert vector.shape == (size,)
        assert np.linalg.norm(vector.astype(np.float64)) == pytest.approx(1, abs=1e-6)


def test_different_texts_and_models_have_nearly_orthogonal_vectors() -> None:
    vectors = np.stack([*(embedding_of(text) for text in TEXTS), embedding_of("a", model="another")])
    angles = vectors @ vectors.T
    np.fill_diagonal(angles, 0)
    assert np.abs(angles).max() < 0.2  # 8 standard deviations of 1 / sqrt(1,536)


def test_a_row_does_not_depend_on_other_rows() -> None:
    together = embeddings_of(TEXTS, 64, "m")
    for text, row in zip(TEXTS, together, strict=True):
        assert np.array_equal(row, embedding_of(text, dimensions=64, model="m"))


@pytest.mark.parametrize("size", [1, 7, 8, 256, 1_535])
def test_a_shortened_vector_is_the_renormalised_beginning_of_the_full_one(size: int) -> None:
    beginning = embedding_of("a text")[:size].astype(np.float64)
    short = embedding_of("a text", dimensions=size)
    assert short.shape == (size,)
    np.testing.assert_allclose(short, beginning / np.linalg.norm(beginning), atol=1e-7)


def test_another_process_computes_the_same_bytes() -> None:
    code = "from asyncembed.testing import embedding_of; print(embedding_of('äa').tobytes().hex())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout
    assert bytes.fromhex(other.strip()) == embedding_of("äa").tobytes()


def test_the_vectors_do_not_change_between_releases() -> None:
    # Fixed values: vectors stored in a user's fixtures must still match after an upgrade.
    expected = [-0.01578576, -0.51040614, 0.41569158, 0.7524544, -0.01578576]
    np.testing.assert_allclose(embedding_of("hello", dimensions=5), expected, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 1_536, 3_072])
def test_both_encodings_give_back_the_same_float32(size: int) -> None:
    vectors = embeddings_of([f"text {i}" for i in range(130)], size, "m")  # more than two slices
    for row, text, numbers in zip(vectors, as_base64(vectors), as_numbers(vectors), strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(json.loads(text)), "<f4"), row)
        assert np.array_equal(np.array(json.loads(numbers), np.float64).astype(np.float32), row)
