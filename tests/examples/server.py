"""The web app as a process of its own, as `python -m examples.web_app` starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class WebApp:
    """A running server, and what it said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log = ""
        self.url = self.wait_for(r"running on (http://127\.0\.0\.1:\d+)")

    def wait_for(self, pattern: str) -> str:
        """Read on until a line of the log has the pattern; return its group."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError(f"it ended without saying {pattern!r}:\n{self.log}")

    def wait(self) -> int:
        """Read the log to its end; return the exit code."""
        _, rest = self.process.communicate(timeout=30)
        self.log += rest
        return self.process.returncode


@contextmanager
def web_app(folder: Path, **environment: str) -> Iterator[WebApp]:
    """Start it on a free port, with a store in the folder; kill it afterwards if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.web_app"],
        cwd=ROOT,
        env={**os.environ, "PORT": "0", "DATABASE_URL": str(folder / "search.db"), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield WebApp(process)
        finally:
            process.kill()
