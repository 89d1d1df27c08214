"""`python -m examples.web_app`: runs the app in uvicorn, configured by environment variables."""

from __future__ import annotations

import os

import uvicorn

from .settings import Settings


def main() -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are open then are still answered."""
    settings = Settings.read(os.environ)
    uvicorn.run(
        "examples.web_app.app:make_app",
        factory=True,  # each worker process (WEB_CONCURRENCY) makes its own app
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.shutdown_s,
    )


if __name__ == "__main__":
    main()
