"""The script and the transfer run with their documented commands and do what they promise."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asyncembed.testing import EmbeddingServer, InvalidInput, poison, script
from examples.etl import ARTICLES, CHANGES, transfer
from tests.examples.held import Held
from tests.stores import run_sql

ROOT = Path(__file__).parent.parent.parent


def run(module: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", module],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_the_script_embeds_only_the_changed_note_and_finds_the_right_one() -> None:
    done = run("examples.script")
    assert done.returncode == 0, done.stderr
    plan, first, second, best, _ = done.stdout.splitlines()
    assert "3 texts" in plan
    assert "3 stored, 0 skipped" in first
    assert "1 stored, 2 skipped" in second
    assert "bread" in best


def test_the_transfer_has_a_demonstration_in_a_temporary_database() -> None:
    done = run("examples.etl")
    assert done.returncode == 0, done.stderr
    first, second, nearest = done.stdout.splitlines()
    assert "3 stored, 0 skipped" in first
    assert "1 stored, 1 skipped, 0 failed, 1 pruned" in second
    assert nearest.endswith("Bread")


def provided(server: EmbeddingServer) -> dict[str, str]:
    return {
        "OPENAI_BASE_URL": server.base_url,
        "OPENAI_API_KEY": "any",
        "EMBEDDING_MODEL": "text-embedding-3-small",
    }


def vectors(dsn: str) -> dict[int, Any]:
    return dict(run_sql(dsn, "SELECT article_id, embedding::text FROM article_embeddings"))


def test_a_transfer_follows_its_source(dsn: str) -> None:
    run_sql(dsn, *ARTICLES.split(";"))
    done = run("examples.etl", DATABASE_URL=dsn)
    assert done.returncode == 0, done.stderr
    assert "3 stored, 0 skipped" in done.stdout
    before = vectors(dsn)

    run_sql(dsn, *CHANGES.split(";"))
    assert "1 stored, 1 skipped, 0 failed, 1 pruned" in run("examples.etl", DATABASE_URL=dsn).stdout
    after = vectors(dsn)
    assert sorted(before) == [1, 2, 3]
    assert sorted(after) == [1, 3]
    assert after[1] == before[1]
    assert after[3] != before[3]


async def test_a_stopped_transfer_keeps_its_rows_and_deletes_none(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_sql(dsn, *ARTICLES.split(";"))
    assert (await transfer(dsn, "local")).success_count == 3
    run_sql(dsn, *CHANGES.split(";"))
    stop = asyncio.Event()
    stop.set()
    report = await transfer(dsn, "local", stop)
    assert (report.success_count, report.failed_count, report.pruned_count) == (0, 0, None)
    assert sorted(vectors(dsn)) == [1, 2, 3]


async def test_sigterm_lets_a_transfer_store_its_batches_in_flight(dsn: str) -> None:
    run_sql(dsn, *ARTICLES.split(";"))
    gate = asyncio.Event()
    async with EmbeddingServer(faults=script([Held(gate)])) as server:
        job = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "examples.etl"),
            cwd=ROOT,
            env={**os.environ, **provided(server), "DATABASE_URL": dsn},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        await server.until(lambda: server.in_flight == 1)
        job.send_signal(signal.SIGTERM)
        assert job.stderr is not None
        assert b"storing the batches in flight" in await job.stderr.readline()
        gate.set()
        out, _ = await job.communicate()
    assert job.returncode == 128 + signal.SIGTERM
    assert b"3 stored" in out
    assert sorted(vectors(dsn)) == [1, 2, 3]


def test_a_transfer_that_fails_prints_one_line_without_a_traceback(dsn: str) -> None:
    done = run("examples.etl", DATABASE_URL=dsn)
    assert done.returncode == 1
    assert "articles" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_refused_article_is_named_and_the_others_are_transferred(dsn: str) -> None:
    run_sql(dsn, *ARTICLES.split(";"))
    with EmbeddingServer(faults=poison(lambda text: "Bicycle" in text, InvalidInput())).in_thread() as server:
        done = await asyncio.to_thread(run, "examples.etl", DATABASE_URL=dsn, **provided(server))
    assert done.returncode == 1
    assert "2 stored, 0 skipped, 1 failed" in done.stdout
    assert done.stderr.startswith("article 2: ")
    assert sorted(vectors(dsn)) == [1, 3]
