"""The web app as a process of its own, as `python -m examples.web_app` starts it."""

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
    """A running server, and what it has said so far: read at once, so that it never waits for its reader."""

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
        """Wait until a further line of the log has these words."""
        while (line := self._lines.get()) is not None:
            if words in line:
                return
        raise AssertionError(f"it ended without saying {words!r}:\n{self.log}")

    def rss_bytes(self) -> int:
        """The memory it has now (Linux)."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def wait(self) -> int:
        """Wait for its end; return the exit code."""
        code = self.process.wait(timeout=30)
        self._reader.join()
        return code


@contextmanager
def web_app(folder: Path, *, watched: bool = False, **environment: str) -> Iterator[WebApp]:
    """Start it on a free port, with a store in the folder; kill it afterwards if it still runs."""
    command = ["examples.web_app"]
    if watched:
        command = ["uvicorn", "tests.examples.watched:make_app", "--factory", "--port=0", "--no-access-log"]
    surroundings = {"PORT": "0", "DATABASE_URL": str(folder / "search.db"), **environment}
    with _process(*command, stderr=subprocess.PIPE, **surroundings) as process:
        app = WebApp(process)
        try:
            app.wait_for("running on http")
            yield app
        finally:
            process.kill()
            app.wait()


@contextmanager
def provider(dimensions: int, latency_s: float, fault_rate: float) -> Iterator[str]:
    """Start the server that stands for OpenAI as a process; yield its address."""
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
