"""Ctrl-C and SIGTERM: the first ends a run well, the second cancels it, the third kills the process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context in which the first signal sets `stop` and calls `on_first`, and the second cancels the current task."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.stop = asyncio.Event()
        self.received: signal.Signals | None = None  # the first signal, once there was one
        self._on_first = on_first
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._previous: dict[signal.Signals, Any] = {}  # the handlers before ours

    def __enter__(self) -> Self:
        with suppress(ValueError):  # not in the main thread, where the application handles signals itself
            for number in _SIGNALS:
                # not loop.add_signal_handler, which Windows does not support
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The exit code that shells expect of a process ended by this signal; 0 without a signal."""
        return 0 if self.received is None else 128 + self.received

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._handle, signal.Signals(number))

    def _handle(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            self.stop.set()
            with suppress(OSError):  # standard error is closed or full
                self._on_first()
            return
        self._previous = dict.fromkeys(_SIGNALS, signal.SIG_DFL)  # from now on, a signal kills
        self.__exit__()
        if self._task is not None:
            self._task.cancel()
