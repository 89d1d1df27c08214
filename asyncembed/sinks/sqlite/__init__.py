"""Vectors in an SQLite file: `SQLiteSink`."""

from .sink import SQLiteSink

__all__ = ["SQLiteSink"]
