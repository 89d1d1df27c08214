"""`Embedder`, and the path of a call through it: cache, shared or bulk requests, results."""

from .embedder import Embedder

__all__ = ["Embedder"]
