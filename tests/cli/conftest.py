"""An empty folder, a server, and the command in this process, for all tests of the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from asyncembed.cli.commands import command
from asyncembed.testing import EmbeddingServer
from tests.cli.helpers import Run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Run:
    """Run the command in this process. Whatever it raises, other than to exit, fails the test."""

    def run(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(command, arguments, input=input, catch_exceptions=False)

    return run


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingServer]:
    with EmbeddingServer(dimensions=8, api_key="test").in_thread() as server:
        monkeypatch.setenv("OPENAI_API_KEY", "test")
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        yield server
