"""Runs a server in a separate process while something is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving(module: str, *options: object) -> Iterator[str]:
    """Start `python -m module` with the options; yield the address that it prints in its first line."""
    command = [sys.executable, "-m", module, *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()
