"""Runs the web app in a separate process, as `python -m examples.web_app` does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parent.parent.parent


class WebApp:
    """A running server and its log. A thread reads the log, so that the server never blocks on a full pipe."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log = ""
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def url(self) -> str:
        found = re.search(r"running on (http://127\.0\.0\.1:\d+)", self.log)
        assert found is not None, self.log
        return found[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, words: str) -> None:
        """Wait until a new line of the log contains these words."""
        while (line := self._lines.get()) is not None:
            if words in line:
                return
        raise AssertionError(f"the server exited without logging {words!r}:\n{self.log}")

    def rss_bytes(self) -> int:
        """Return the resident memory of the process (Linux)."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def wait(self) -> int:
        """Wait until the process exits; return the exit code."""
        code = self.process.wait(timeout=30)
        self._reader.join()
        return code


@contextmanager
def web_app(folder: Path, *, watched: bool = False, **environment: str) -> Iterator[WebApp]:
    """Start the app on a free port, with a store in the folder; kill it afterwards if it still runs."""
    command = ["examples.web_app"]
    if watched:
        command = ["uvicorn", "tests.examples.watched:make_app", "--factory", "--port=0", "--no-access-log"]
    variables = {"PORT": "0", "DATABASE_URL": str(folder / "search.db"), **environment}
    with _process(*command, stderr=subprocess.PIPE, **variables) as process:
        app = WebApp(process)
        try:
            app.wait_for("running on http")
            yield app
        finally:
            process.kill()
            app.wait()


@contextmanager
def provider(dimensions: int, latency_s: float, fault_rate: float) -> Iterator[str]:
    """Start the test server for embeddings in a separate process; yield its address."""
    options = {"dimensions": dimensions, "latency": latency_s, "fault-rate": fault_rate}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with _process("asyncembed.testing", *arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def _process(
    module: str, *arguments: str, stdout: int = subprocess.DEVNULL, stderr: int | None = None, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=stderr,
        text=True,
    )
