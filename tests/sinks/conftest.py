"""One store per test, of every kind, behind the same function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncembed.sinks import SQLiteSink

OpenStore = Callable[..., Any]
"""Makes a sink on the test's own store; called again, another sink on the same store."""


@pytest.fixture(params=["sqlite"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    return lambda **options: SQLiteSink(tmp_path / "vectors.db", **options)
