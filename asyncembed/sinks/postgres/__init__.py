"""Vectors in PostgreSQL with pgvector: `PostgresSink`."""

from .sink import PostgresSink

__all__ = ["PostgresSink"]
