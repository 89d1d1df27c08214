"""The stores of `tests.sinks`, as addresses that another process can be given."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["sqlite", "postgres"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store."""
    if request.param == "sqlite":
        return str(tmp_path / "vectors.db")
    address: str = request.getfixturevalue("dsn")
    return address
