"""Fixtures for the examples: addresses of empty stores, and the web app with a client."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest

from examples.web_app.app import make_app
from examples.web_app.settings import Settings

OpenApp: TypeAlias = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]
"""Starts the app with the given settings and yields a client that calls it in this process."""


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store."""
    if request.param == "sqlite":
        return str(tmp_path / "search.db")
    address: str = request.getfixturevalue("dsn")
    return address


@pytest.fixture
def open_app(tmp_path: Path) -> OpenApp:
    @asynccontextmanager
    async def opened(**settings: Any) -> Any:
        app = make_app(Settings(**{"database_url": str(tmp_path / "search.db"), **settings}))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client,
        ):
            yield client

    return opened
