"""`Embedder`, and the way of a call through it: cache, shared request or requests of its own, results."""

from .embedder import Embedder

__all__ = ["Embedder"]
