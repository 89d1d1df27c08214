"""For all tests: the virtual clock, the vocabulary that tiktoken would download, the databases; no skips under CI."""

from __future__ import annotations

import asyncio
import base64
import os
import selectors
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

# fixtures; imported only here, so that one PostgreSQL serves the whole session
from tests.stores import bare_dsn, dsn, open_store, postgres, shared_dsn  # noqa: F401

try:
    import uvloop
except ImportError:  # not available on Windows
    uvloop = None


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: advances the loop's clock to the next timer instead."""

    advance: Callable[[float], None]

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("deadlock: no timer is set and no task is ready to run")
            self.advance(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that never sleeps but advances its clock. For code without sockets; run_in_executor runs in the loop."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        selector.advance = self.advance
        super().__init__(selector)
        self._now = 1_000.0

    def time(self) -> float:
        self._now += 1e-9  # if the clock stood still between timers, a loop that polls it would never end
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _failed_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _failed_if_skipped((yield))


def _failed_if_skipped(report: Report) -> Report:
    """Under CI, turn a skip into a failure: there, everything that a test needs is installed."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI: {report.longrepr[-1]}"  # type: ignore[index]  # path, line, reason
    return report


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualLoop}
    if item.get_closest_marker("any_loop") and uvloop is not None:
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture(scope="session")
def tiktoken_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds cl100k_base where tiktoken looks for it, so that tests of tiktoken need no network."""
    import quicktok

    encoding = quicktok.get_encoding("cl100k_base")
    lines = (base64.b64encode(encoding.decode_single_token_bytes(rank)) + b" %d\n" % rank for rank in range(100_256))
    folder = tmp_path_factory.mktemp("tiktoken")
    # the SHA-1 of the address from which tiktoken would download it (tiktoken/load.py)
    (folder / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may use the API key or the address of the person who runs it."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
