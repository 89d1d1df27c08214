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

    def rss_bytes(self) -> int:
        """The memory it has now (Linux)."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def wait(self) -> int:
        """Read the log to its end; return the exit code."""
        _, rest = self.process.communicate(timeout=30)
        self.log += rest
        return self.process.returncode


@contextmanager
def web_app(folder: Path, *, watched: bool = False, **environment: str) -> Iterator[WebApp]:
    """Start it on a free port, with a store in the folder; kill it afterwards if it still runs."""
    command = ["examples.web_app"]
    if watched:
        command = ["uvicorn", "tests.examples.watched:make_app", "--factory", "--port=0", "--no-access-log"]
    with _process(*command, PORT="0", **{"DATABASE_URL": str(folder / "search.db"), **environment}) as process:
        yield WebApp(process)


@contextmanager
def provider(dimensions: int, latency_s: float, fault_rate: float) -> Iterator[str]:
    """Start the server that stands for OpenAI as a process; yield its address."""
    options = {"dimensions": dimensions, "latency": latency_s, "fault-rate": fault_rate}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with _process("asyncembed.testing", *arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@contextmanager
def _process(
    module: str, *arguments: str, stdout: int = subprocess.DEVNULL, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
