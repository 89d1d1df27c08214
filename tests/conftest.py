"""The virtual clock, the vocabulary that tiktoken would download, and the stores for all tests."""

from __future__ import annotations

import asyncio
import base64
import selectors
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

# fixtures; here and nowhere else, so that one PostgreSQL serves the whole session
from tests.stores import bare_dsn, dsn, open_store, postgres, shared_dsn  # noqa: F401

try:
    import uvloop
except ImportError:  # Windows has none
    uvloop = None


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: tells the loop's clock to jump to the next timer instead."""

    jump: Callable[[float], None]

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("deadlock: no timer is set and nothing is ready, so nothing will ever happen")
            self.jump(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that never sleeps but moves its clock. For code without sockets; threads are run in line."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.jump = self._jump
        super().__init__(selector)
        self._now = 1_000.0

    def time(self) -> float:
        self._now += 1e-9  # a clock that stands still between timers can loop for ever
        return self._now

    def _jump(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualLoop}
    if item.get_closest_marker("any_loop") and uvloop is not None:
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def tiktoken_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds cl100k_base as tiktoken expects it, so that its own path needs no network."""
    import quicktok

    encoding = quicktok.get_encoding("cl100k_base")
    lines = (base64.b64encode(encoding.decode_single_token_bytes(rank)) + b" %d\n" % rank for rank in range(100_256))
    folder = tmp_path_factory.mktemp("tiktoken")
    # the SHA-1 of the address it would be downloaded from (tiktoken/load.py)
    (folder / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may use a key or an address of whoever runs it."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
