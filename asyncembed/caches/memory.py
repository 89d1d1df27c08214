"""`MemoryCache`: vectors in this process, with LRU eviction."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from ..options import check_range
from ..types import Vectors

DEFAULT_MAX_BYTES = 256 * 1024 * 1024

# The overhead of an entry: the headers of two bytes objects, an OrderedDict's node, and its share of two hash tables.
# tracemalloc, CPython 3.11, 2026-11: 140 to 190 bytes while the cache grows, up to 260 when it is full.
ENTRY_BYTES = 288

VECTORS_PER_TURN = 512  # copied in 1 ms; then other tasks run


class MemoryCache:
    """Keeps vectors in this process; the least recently used ones are evicted first.

    Embedders, event loops and threads may share it. It need not be closed.

    Args:
        max_bytes: The most memory it may take, including its overhead.

    Raises:
        ConfigError: `max_bytes` is not a whole number, or less than 1.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        check_range("max_bytes", max_bytes, 1)
        self._max_bytes = max_bytes
        self._bytes = 0
        # As bytes: they cannot be altered, and a view of them costs nothing.
        self._vectors: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<MemoryCache: {len(self):,} vectors, {self._bytes:,} of {self._max_bytes:,} bytes>"

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def size_bytes(self) -> int:
        """The memory it takes now."""
        return self._bytes

    async def get(self, keys: Sequence[bytes]) -> Mapping[bytes, Vectors]:
        """Return the stored vectors of these keys, each float32[d] and read-only, without waiting."""
        found: dict[bytes, Vectors] = {}
        with self._lock:
            for key in keys:
                vector = self._vectors.get(key)
                if vector is not None:
                    self._vectors.move_to_end(key)
                    found[key] = np.frombuffer(vector, np.float32)
        return found

    async def put(self, vectors: Mapping[bytes, Vectors]) -> None:
        """Keep copies of the vectors, except those too large for the whole cache."""
        items = list(vectors.items())
        for start in range(0, len(items), VECTORS_PER_TURN):
            if start:
                await asyncio.sleep(0)
            with self._lock:
                for key, vector in items[start : start + VECTORS_PER_TURN]:
                    self._keep(key, vector.astype(np.float32, copy=False).tobytes())

    async def aclose(self) -> None:
        """Remove all vectors. The cache may be used again."""
        with self._lock:
            self._vectors.clear()
            self._bytes = 0

    def _keep(self, key: bytes, vector: bytes) -> None:
        old = self._vectors.pop(key, None)
        if old is not None:
            self._bytes -= _size(key, old)
        size = _size(key, vector)
        if size > self._max_bytes:
            return
        while self._bytes + size > self._max_bytes:
            self._bytes -= _size(*self._vectors.popitem(last=False))
        self._vectors[key] = vector
        self._bytes += size


def _size(key: bytes, vector: bytes) -> int:
    return len(key) + len(vector) + ENTRY_BYTES
