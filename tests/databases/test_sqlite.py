"""Many rows in one step of SQLite's: what goes in, and what comes out of it."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from asyncembed.databases.sqlite import batched, concatenated, placeholders


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        pytest.param(0, [], id="nothing"),
        pytest.param(2, [2], id="less than a piece"),
        pytest.param(3, [3], id="one piece"),
        pytest.param(7, [3, 3, 1], id="a rest"),
    ],
)
def test_batched_hold_all_values_in_order(count: int, sizes: list[int]) -> None:
    found = list(batched(iter(range(count)), 3))
    assert [len(piece) for piece in found] == sizes
    assert [value for piece in found for value in piece] == list(range(count))


def test_placeholders_stand_for_values_or_for_rows_of_them() -> None:
    assert placeholders(3) == "?, ?, ?"
    assert f"({placeholders(0)})" == "()"
    assert placeholders(2, "(?, ?)") == "(?, ?), (?, ?)"


def test_concatenated_blobs_are_their_bytes_one_after_the_other_zeros_and_all() -> None:
    blobs = [bytes(range(256)), b"\0\0\0\0", b"", bytes(reversed(range(256))), b"\xed\xa0\x80\xff\xfe"]
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE t (blob BLOB)")
        connection.executemany("INSERT INTO t VALUES (?)", [(blob,) for blob in blobs])
        assert connection.execute(f"SELECT {concatenated('blob')} FROM t").fetchone() == (b"".join(blobs),)
        assert connection.execute(f"SELECT {concatenated('blob')} FROM t WHERE false").fetchone() == (None,)
