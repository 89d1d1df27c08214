"""Keys and vectors by name, and a look at whether something waits."""

from __future__ import annotations

import hashlib
from collections.abc import Coroutine
from typing import Any

import numpy as np

from asyncembed.types import Vectors


def key_of(name: object) -> bytes:
    """The key of whatever has this name."""
    return hashlib.sha256(str(name).encode()).digest()


def vector(name: object, size: int = 8) -> Vectors:
    """A vector float32[size] that is a function of its name alone."""
    first = int.from_bytes(key_of(name)[:3], "big")
    return (np.arange(size) + first).astype(np.float32)


def in_one_turn(coroutine: Coroutine[Any, Any, object]) -> bool:
    """Tell whether it comes to its end without waiting for anything; if not, it is given up."""
    try:
        coroutine.send(None)
    except StopIteration:
        return True
    coroutine.close()
    return False
