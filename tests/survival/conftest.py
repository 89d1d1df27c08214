"""The stores of `tests.sinks`, and processes that may be killed."""

from __future__ import annotations

from tests.sinks.conftest import dsn, open_store, postgres, shared_dsn

__all__ = ["dsn", "open_store", "postgres", "shared_dsn"]
