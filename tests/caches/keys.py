"""Keys and vectors by name, and whether a coroutine waits."""

from __future__ import annotations

import hashlib
from collections.abc import Coroutine
from typing import Any

import numpy as np

from asyncembed.types import Vectors


def key_of(name: object) -> bytes:
    """The key of a text or vector with this name."""
    return hashlib.sha256(str(name).encode()).digest()


def vector(name: object, size: int = 8) -> Vectors:
    """A vector float32[size] that is a function of its name alone."""
    first = int.from_bytes(key_of(name)[:3], "big")
    return (np.arange(size) + first).astype(np.float32)


def in_one_turn(coroutine: Coroutine[Any, Any, object]) -> bool:
    """Whether the coroutine ends without waiting; if it waits, it is closed."""
    try:
        coroutine.send(None)
    except StopIteration:
        return True
    coroutine.close()
    return False
