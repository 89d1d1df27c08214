"""The script and the transfer run as their first lines say, and show what they promise."""

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
from tests.stores import run_sql as told

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


def test_the_script_embeds_only_what_changed_and_finds_the_right_note() -> None:
    done = run("examples.script")
    assert done.returncode == 0, done.stderr
    plan, first, second, best, _ = done.stdout.splitlines()
    assert "3 texts" in plan
    assert "3 stored, 0 skipped" in first
    assert "1 stored, 2 skipped" in second
    assert "bread" in best


def test_the_transfer_shows_itself_in_a_database_of_its_own() -> None:
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
    return dict(told(dsn, "SELECT article_id, embedding::text FROM article_embeddings"))


def test_a_transfer_follows_its_source(dsn: str) -> None:
    told(dsn, *ARTICLES.split(";"))
    done = run("examples.etl", DATABASE_URL=dsn)
    assert done.returncode == 0, done.stderr
    assert "3 stored, 0 skipped" in done.stdout
    before = vectors(dsn)

    told(dsn, *CHANGES.split(";"))
    assert "1 stored, 1 skipped, 0 failed, 1 pruned" in run("examples.etl", DATABASE_URL=dsn).stdout
    after = vectors(dsn)
    assert sorted(before) == [1, 2, 3]
    assert sorted(after) == [1, 3]
    assert after[1] == before[1]
    assert after[3] != before[3]


async def test_a_transfer_that_is_stopped_keeps_what_it_has_and_deletes_nothing(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(dsn, *ARTICLES.split(";"))
    assert (await transfer(dsn, "local")).success_count == 3
    told(dsn, *CHANGES.split(";"))
    stop = asyncio.Event()
    stop.set()
    report = await transfer(dsn, "local", stop)
    assert (report.success_count, report.failed_count, report.pruned_count) == (0, 0, None)
    assert sorted(vectors(dsn)) == [1, 2, 3]


async def test_a_transfer_that_is_terminated_stores_what_is_under_way(dsn: str) -> None:
    told(dsn, *ARTICLES.split(";"))
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
        assert b"storing what is under way" in await job.stderr.readline()
        gate.set()
        out, _ = await job.communicate()
    assert job.returncode == 128 + signal.SIGTERM
    assert b"3 stored" in out
    assert sorted(vectors(dsn)) == [1, 2, 3]


def test_a_transfer_that_cannot_be_done_says_so_in_a_line(dsn: str) -> None:
    done = run("examples.etl", DATABASE_URL=dsn)
    assert done.returncode == 1
    assert "articles" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_refused_article_is_named_and_the_others_are_transferred(dsn: str) -> None:
    told(dsn, *ARTICLES.split(";"))
    with EmbeddingServer(faults=poison(lambda text: "Bicycle" in text, InvalidInput())).in_thread() as server:
        done = await asyncio.to_thread(run, "examples.etl", DATABASE_URL=dsn, **provided(server))
    assert done.returncode == 1
    assert "2 stored, 0 skipped, 1 failed" in done.stdout
    assert done.stderr.startswith("article 2: ")
    assert sorted(vectors(dsn)) == [1, 3]
