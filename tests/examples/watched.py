"""The web app with a watch on its event loop; at its end it says how long that stood still at most."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from asyncembed.testing import watch_loop
from examples.web_app import app as web_app


def make_app() -> FastAPI:
    """Return the app as it is, but for its lifespan."""
    app = web_app.make_app()
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Mapping[str, Any] | None]:
        async with inner(app) as state:
            async with watch_loop() as stalls:
                yield state
            sys.stderr.write(f"stood still for {stalls.longest_s * 1000:.1f} ms\n")

    app.router.lifespan_context = lifespan
    return app
