"""`python -m examples.web_app`: the app in uvicorn, set up by the environment."""

from __future__ import annotations

import os

import uvicorn

from .settings import Settings


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; what is under way then is answered first."""
    settings = Settings.read(os.environ)
    uvicorn.run(
        "examples.web_app.app:make_app",
        factory=True,  # so that each of several workers (WEB_CONCURRENCY) makes its own app, in its own process
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.shutdown_s,
    )


if __name__ == "__main__":
    main()
