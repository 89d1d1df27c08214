"""Counts how often sqlite3 releases the GIL: at every statement that starts, and at every row that it returns."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest


class Steps:
    """Counts the steps of all connections that are made after this object."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        connect = sqlite3.connect

        def watched(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection = connect(*args, **kwargs)
            connection.set_trace_callback(lambda sql: self._step())
            connection.row_factory = lambda cursor, row: self._step() or row
            return connection

        monkeypatch.setattr(sqlite3, "connect", watched)

    def _step(self) -> None:
        self.count += 1
