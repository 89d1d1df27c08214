"""Caches: vectors that need not be paid for again, in memory or in a file.

A cache knows neither texts nor models, only keys of 32 bytes. `embedder.caching` makes the keys, reads and writes.
"""

from __future__ import annotations

import os
from typing import Any

from ..errors import ConfigError
from ..types import Cache
from .memory import MemoryCache

__all__ = ["MemoryCache", "open_cache"]


def open_cache(option: object) -> tuple[Cache | None, bool]:
    """Return the cache that the option `cache=` means, and whether it was made here, so that its owner closes it.

    Raises:
        ConfigError: The option is no cache.
    """
    if option is None or option is False:
        return None, False
    if option is True:
        return MemoryCache(), True
    if isinstance(option, (str, os.PathLike)):
        from .sqlite import SQLiteCache

        return SQLiteCache(option), True
    cache: Any = option
    if isinstance(option, type) or not all(callable(getattr(cache, name, None)) for name in ("get", "put", "aclose")):
        raise ConfigError(f"cache is {type(option).__name__}; it must be a Cache, a path, or True for one in memory")
    return cache, False
