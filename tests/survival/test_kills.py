"""Processes that are killed with SIGKILL, and the next run: every id is stored once, and little is paid twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncembed import SQLiteSink
from asyncembed.testing import EmbeddingServer
from bench.kills import DIMENSIONS, MODEL, Figures, Job, Store, finish, inputs_of, run_and_kill, start, work

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL exists only in POSIX")


def test_kills_at_any_instant_store_every_id_once_and_pay_little_twice(target: str) -> None:
    dice = random.Random(4)
    requests = threading.Semaphore(0)

    def wait(child: subprocess.Popen[str]) -> None:
        for _ in range(dice.randrange(60)):  # five times at most 59, of the 300 requests of the job
            assert requests.acquire(timeout=30)

    def count(request: Any) -> None:
        requests.release()

    with EmbeddingServer(dimensions=DIMENSIONS, latency_s=0.005, faults=count, keep_texts=False).in_thread() as server:
        job = Job(target, server.base_url, 3_000, max_batch_size=10)
        figures = Figures()
        kills = run_and_kill(job, 5, wait)
        figures.add(job, Store(target), inputs_of(server), kills)

    assert figures == Figures(jobs=1, kills=5, repaid=figures.repaid, bound=5 * 8 * 10)
    assert 0 <= figures.repaid <= figures.bound


@pytest.mark.parametrize(
    ("die", "paid_twice"),
    [
        pytest.param("before", 50, id="between reply and transaction"),
        pytest.param("inside", 50, id="inside the transaction"),
        pytest.param("after", 0, id="after the commit"),
    ],
)
def test_a_batch_is_paid_twice_only_if_it_was_not_committed(target: str, die: str, paid_twice: int) -> None:
    with EmbeddingServer(dimensions=DIMENSIONS, keep_texts=False).in_thread() as server:
        job = Job(target, server.base_url, 500, concurrency=1, die=die, die_at=3)
        assert finish(start(job)) == -signal.SIGKILL
        assert len(Store(target).rows()) == (150 if die == "after" else 100)
        assert asyncio.run(work(Job(target, server.base_url, 500, concurrency=1))) == 0
        figures = Figures()
        figures.add(job, Store(target), inputs_of(server), kills=1)
    assert figures == Figures(jobs=1, kills=1, repaid=paid_twice, bound=50)


@pytest.mark.parametrize(
    ("die", "stored"),
    [pytest.param("inside", 100, id="inside the transaction"), pytest.param("after", 150, id="after the commit")],
)
async def test_a_kill_without_a_write_ahead_log_leaves_whole_batches(tmp_path: Path, die: str, stored: int) -> None:
    path = tmp_path / "vectors.db"
    async with SQLiteSink(path) as sink:
        await sink.prepare(MODEL, DIMENSIONS)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    with EmbeddingServer(dimensions=DIMENSIONS, keep_texts=False).in_thread() as server:
        job = Job(str(path), server.base_url, 500, concurrency=1, die=die, die_at=3, rollback=True)
        assert await asyncio.to_thread(lambda: finish(start(job))) == -signal.SIGKILL
        assert not path.with_name("vectors.db-wal").exists()
        store = Store(str(path))
        assert len(store.rows()) == stored
        assert await work(replace(job, die="")) == 0
        assert len(store.rows()) == 500
        assert store.is_sound()
        assert inputs_of(server) == 500 + (150 - stored)
