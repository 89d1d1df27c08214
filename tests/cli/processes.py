"""Runs the command in its own process, and holds its requests back for as long as a test needs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from asyncembed.testing import Fault

posix = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


@dataclass
class Held(Fault):
    """A fault that holds each response back until the test sets `released`."""

    wanted: int
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    released: threading.Event = field(default_factory=threading.Event)

    async def send(self, wire: Any, answer: Any) -> None:
        self.begun.release()
        await asyncio.to_thread(self.released.wait)
        await wire.send(answer)

    def wait(self) -> None:
        """Wait until `wanted` requests are under way."""
        for _ in range(self.wanted):
            assert self.begun.acquire(timeout=30)


@contextmanager
def process(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    popen = subprocess.Popen(
        [sys.executable, "-m", "asyncembed", *arguments],
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        **options,
    )
    with popen:
        try:
            yield popen
        finally:
            popen.kill()


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell; `asyncembed` in it is the command under test."""
    line = line.replace("asyncembed", f"{sys.executable} -m asyncembed")
    return subprocess.run(line, shell=True, capture_output=True, timeout=30, env=os.environ | environment)
