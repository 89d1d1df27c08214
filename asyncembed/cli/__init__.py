"""The entry point of the command `asyncembed`. It also works without the extra `cli`, to report that it is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from io import TextIOWrapper
from typing import NoReturn

# the same as in `commands`, which cannot be imported without click
MISUSED, INTERRUPTED = 2, 130


def main() -> NoReturn:
    """Run the command and exit with its code; with 2 if the extra `cli` is not installed."""
    if find_spec("click") is None or find_spec("rich") is None:
        print('asyncembed: the command needs click and rich: pip install "asyncembed[cli]"', file=sys.stderr)  # noqa: T201
        sys.exit(MISUSED)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show ä must not end a run
    try:
        from .commands import command

        command(prog_name="asyncembed")
    except KeyboardInterrupt:  # before or after a run, which handles signals itself
        sys.exit(INTERRUPTED)
    raise AssertionError("click exits by itself")
