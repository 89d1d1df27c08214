"""`open_sink`: the sink for an address."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from asyncembed.errors import SinkConfigError
from asyncembed.sinks import PostgresSink, SQLiteSink, open_sink


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("x.db", "x.db"),
        ("sqlite:///x.db", "x.db"),
        ("sqlite:///some/x.db", "some/x.db"),
        ("sqlite:////abs/x.db", "/abs/x.db"),
        ("/abs/what?.db", "/abs/what?.db"),
        (":memory:", ":memory:"),
        ("sqlite:///:memory:", ":memory:"),
        (Path("some") / "x.db", str(Path("some") / "x.db")),
    ],
)
def test_a_path_or_an_sqlite_address_opens_a_file(address: str | Path, shown: str) -> None:
    assert repr(open_sink(address)) == f"SQLiteSink({shown!r}, table='embeddings')"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_a_postgresql_address_opens_a_database(scheme: str) -> None:
    sink = open_sink(f"{scheme}://user:SECRET@host/db", table="docs", pool_size=2)
    assert isinstance(sink, PostgresSink)
    assert repr(sink) == "PostgresSink(table 'docs' in db on host)"


def test_options_are_passed_on() -> None:
    sink = open_sink("x.db", table="docs", busy_timeout=1)
    assert isinstance(sink, SQLiteSink)
    assert repr(sink) == "SQLiteSink('x.db', table='docs')"


@pytest.mark.parametrize(
    "address",
    [
        "mysql://u:SECRET@h/db",
        "postgresql+asyncpg://u:SECRET@h/db",
        "sqlite://x.db",
        "sqlite:///",
        "sqlite:///x.db?a=SECRET",
    ],
)
def test_other_addresses_are_refused_without_being_shown(address: str) -> None:
    with pytest.raises(SinkConfigError) as caught:
        open_sink(address)
    assert "SECRET" not in str(caught.value)
    assert "sqlite:///" in str(caught.value)


def test_an_unknown_sink_is_an_attribute_error() -> None:
    import asyncembed.sinks

    with pytest.raises(AttributeError, match="MongoSink"):
        asyncembed.sinks.MongoSink  # noqa: B018


def test_a_driver_is_loaded_only_by_its_own_sink() -> None:
    script = """
import sys
import asyncembed.sinks
assert not {"sqlite3", "asyncpg", "pgvector"} & set(sys.modules)
asyncembed.sinks.open_sink("x.db")
assert "sqlite3" in sys.modules
assert not {"asyncpg", "pgvector"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
