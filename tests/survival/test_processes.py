"""The command with signals, and several processes on one store, for every kind of store."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncembed.testing import EmbeddingServer, script
from bench.kills import DIMENSIONS, Figures, Job, Store, finish, inputs_of, start, text_of
from tests.cli.processes import Held, process
from tests.stores import run_sql

pytestmark = pytest.mark.skipif(os.name != "posix", reason="these signals exist only in POSIX")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingServer]:
    with EmbeddingServer(dimensions=DIMENSIONS, latency_s=0.005).in_thread() as server:
        monkeypatch.setenv("OPENAI_API_KEY", "test")
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        yield server


def checked(job: Job, server: EmbeddingServer, kills: int = 0) -> Figures:
    figures = Figures()
    figures.add(job, Store(job.target), inputs_of(server), kills)
    return figures


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_requests_in_flight_be_stored_and_the_same_command_does_the_rest(
    target: str, server: EmbeddingServer, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(json.dumps({"id": n, "text": text_of(n)}) for n in range(9_000)))
    arguments = ["ingest", str(file), "--to", target, "--concurrency", "2"]
    held = Held(wanted=2)
    server.faults = script([], then=held)
    try:
        with process(*arguments) as child:
            held.wait()
            child.send_signal(number)
            assert child.stderr is not None
            assert child.stderr.readline().startswith("asyncembed: finishing the requests under way")
            held.released.set()
            out, _ = child.communicate(timeout=30)
    finally:
        held.released.set()
    assert (child.returncode, out.partition(";")[0]) == (code, "4,096 stored, 0 skipped, 0 failed")
    assert inputs_of(server) == len(Store(target).rows()) == 4_096

    with process(*arguments) as child:
        out, _ = child.communicate(timeout=30)
    assert (child.returncode, out.partition(";")[0]) == (0, "4,904 stored, 4,096 skipped, 0 failed")
    assert checked(Job(target, "", 9_000), server) == Figures(jobs=1)


def test_two_processes_with_the_same_job_and_store_store_every_id_once(target: str, server: EmbeddingServer) -> None:
    job = Job(target, server.base_url, 2_000)
    children = [start(job), start(job)]
    assert [finish(child) for child in children] == [0, 0]
    figures = checked(job, server)
    assert figures == Figures(jobs=1, repaid=figures.repaid, over_bound=figures.over_bound)
    assert 0 <= figures.repaid <= 2_000  # at worst both pay for everything


def test_processes_with_overlapping_jobs_store_all_rows(target: str, server: EmbeddingServer) -> None:
    jobs = [Job(target, server.base_url, 1_000, first) for first in (0, 400, 800)]
    children = [start(job) for job in jobs]
    assert [finish(child) for child in children] == [0, 0, 0]
    figures = checked(Job(target, "", 1_800), server)
    assert figures == Figures(jobs=1, repaid=figures.repaid, over_bound=figures.over_bound)
    assert 0 <= figures.repaid <= 3 * 1_000 - 1_800


def test_a_process_that_was_killed_in_a_transaction_does_not_block_another(
    target: str, server: EmbeddingServer
) -> None:
    doomed = start(Job(target, server.base_url, 1_000, die="inside", die_at=3))
    other = start(Job(target, server.base_url, 1_000))
    assert [finish(doomed), finish(other)] == [-signal.SIGKILL, 0]
    figures = checked(Job(target, "", 1_000), server, kills=1)
    assert (figures.lost, figures.doubled, figures.others, figures.wrong, figures.damaged) == (0, 0, 0, 0, 0)


def test_the_command_reads_a_query_and_stores_into_any_store(
    target: str, server: EmbeddingServer, dsn: str, tmp_path: Path
) -> None:
    run_sql(
        dsn,
        "CREATE TABLE docs (id int, text text)",
        "INSERT INTO docs SELECT n, 'text ' || n FROM generate_series(0, 99) n",
    )
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": 100, "text": text_of(100)}))
    arguments = ["ingest", f"{dsn}&query=SELECT id, text FROM docs", str(more), "--to", target, "--prune", "--json"]

    def run(code: int = 0) -> dict[str, Any]:
        with process(*arguments) as child:
            out, err = child.communicate(timeout=30)
        assert (child.returncode, err) == (code, "")
        return json.loads(out)

    assert run()["success_count"] == 101
    assert checked(Job(target, "", 101), server) == Figures(jobs=1)
    run_sql(dsn, "DELETE FROM docs WHERE id >= 50")
    more.write_text("")
    assert (run()["skipped_count"], len(Store(target).rows())) == (50, 50)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("postgresql://me:s3cret@127.0.0.1:1/db", "a source in PostgreSQL needs a query"),
        ("postgresql://me:s3cret@127.0.0.1:1/db?query=TABLE docs", "the query in db on 127.0.0.1:1"),
        ("postgresql://me:s3/cret@127.0.0.1:1/db?query=TABLE docs", "the address is not postgresql://"),
    ],
)
def test_an_invalid_query_is_a_one_line_error_without_the_password(
    server: EmbeddingServer, tmp_path: Path, source: str, message: str
) -> None:
    with process("ingest", source, "--to", str(tmp_path / "v.db")) as child:
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err.count("\n"), "s3" in err) == (2, "", 1, False)
    assert err.startswith(f"asyncembed: {message}")
    assert inputs_of(server) == 0
