"""PostgreSQL for its source."""

from __future__ import annotations

from tests.sinks.conftest import dsn, postgres, shared_dsn

__all__ = ["dsn", "postgres", "shared_dsn"]
