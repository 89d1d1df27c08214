"""SQLite in few steps, for all that use it here.

Python's sqlite3 lets go of the interpreter at every step of a statement: once for each row that it yields, and once for
each of `executemany`. While another thread computes, it gets the interpreter back only 5 ms later
(`sys.getswitchinterval`), so 2,000 rows take ten seconds, and the event loop has a thread to wait for as often. So
statements here take many rows at once, and yield one row that holds them all. `bench.busy` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

# SQLite took 999 parameters a statement before 3.32, and takes 32,766 since (sqlite.org/limits.html).
KEYS_A_STATEMENT = 500

# Statements that a connection keeps ready, 128 by default. Each holds on to the values it was last given, which may be
# megabytes.
STATEMENTS_KEPT = 8


def pieces(values: Iterable[T], most: int) -> Iterator[list[T]]:
    """Yield the values in lists of at most so many."""
    left = iter(values)
    while piece := list(islice(left, most)):
        yield piece


def marks(count: int, mark: str = "?") -> str:
    """Return so many marks for parameters, or for rows of them."""
    return ", ".join([mark] * count)


def joined(column: str) -> str:
    """Return SQL for the bytes of all rows of a column of blobs, one after the other, in a database in UTF-8.

    `group_concat` takes the bytes of a blob for a text in the database's encoding, and the cast gives them back; only
    in another encoding they would be changed on the way.
    """
    return f"CAST(group_concat({column}, '') AS BLOB)"
