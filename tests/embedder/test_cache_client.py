"""`lookup`: what is believed of a cache's answer. The rest of it is tested through calls, in `test_cached`."""

from __future__ import annotations

import numpy as np
import pytest

from asyncembed.embedder.caching import believed
from tests.caches.keys import key_of, vector

KEYED = [(name, key_of(name)) for name in "abcd"]


@pytest.mark.parametrize(
    ("size", "hits"),
    [pytest.param(8, "b", id="as long as the model's"), pytest.param(None, "ad", id="as long as the first")],
)
def test_vectors_of_one_size_are_believed(size: int | None, hits: str) -> None:
    found = {key_of("a"): vector("a", 3), key_of("b"): vector("b", 8), key_of("d"): vector("d", 3)}
    believed_ones, missing = believed(KEYED, found, size)
    assert [name for name, _ in believed_ones] == list(hits)
    assert missing == [(name, key) for name, key in KEYED if name not in hits]
    for name, found_one in believed_ones:
        np.testing.assert_array_equal(found_one, vector(name, found_one.size))


def test_an_empty_vector_is_none_and_tells_no_size() -> None:
    found: dict[bytes, object] = {key_of("a"): np.empty(0, np.float32), key_of("b"): vector("b")}
    believed_ones, missing = believed(KEYED, found, None)
    assert [name for name, _ in believed_ones] == ["b"]
    assert [name for name, _ in missing] == ["a", "c", "d"]
