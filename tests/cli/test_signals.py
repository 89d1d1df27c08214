"""`signals`: Ctrl-C and SIGTERM, sent to the command in its own process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess

import pytest

from asyncembed.cli.signals import Interrupts
from asyncembed.testing import EmbeddingServer, script
from tests.cli.helpers import Run, records, stored, write
from tests.cli.processes import Held, posix, process, shell


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stores_what_is_under_way_and_sends_nothing_new(
    run: Run, server: EmbeddingServer, number: signal.Signals, code: int
) -> None:
    held = Held(wanted=2)
    server.faults = script([], then=held)
    arguments = ["ingest", records(9_000), "--to", "v.db", "--concurrency", "2"]
    with process(*arguments) as child:
        held.wait()
        child.send_signal(number)
        assert child.stderr is not None
        assert child.stderr.readline().startswith("asyncembed: finishing the requests under way and storing")
        held.released.set()
        out, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert out.startswith("4,096 stored, 0 skipped, 0 failed; ")
    assert err == "asyncembed: run the same command again to go on: stored records are skipped\n"
    assert len(server.requests) == 2
    assert len(stored()) == 4_096
    assert run(*arguments).stdout.startswith("4,904 stored, 4,096 skipped, 0 failed; ")


@posix
def test_a_second_signal_stops_at_once_and_leaves_the_store_unlocked(run: Run, server: EmbeddingServer) -> None:
    held = Held(wanted=2)
    server.faults = script([], then=held)
    arguments = ["ingest", records(9_000), "--to", "v.db", "--concurrency", "2"]
    try:
        with process(*arguments) as child:
            held.wait()
            child.send_signal(signal.SIGINT)
            assert child.stderr is not None
            child.stderr.readline()
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=30)
    finally:
        held.released.set()
    assert child.returncode == 130
    assert out == ""
    assert err == "asyncembed: stopped; run the same command again to go on: stored records are skipped\n"
    server.faults = script([])
    assert run(*arguments).stdout.startswith("9,000 stored, 0 skipped, 0 failed; ")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_waits_for_standard_input(server: EmbeddingServer, number: signal.Signals) -> None:
    held = Held(wanted=1)
    held.released.set()
    server.faults = script([], then=held)
    with process("ingest", "-", "--to", "v.db", "--json", stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write('{"id": 1, "text": "a"}\n')
        child.stdin.flush()
        held.wait()  # sent, although the input has not ended
        child.send_signal(number)
        assert child.stdout is not None
        document = json.loads(child.stdout.readline())
        child.wait(timeout=30)
    assert child.returncode == 128 + number
    assert document["stopped_by"] == number.name
    assert document["success_count"] == len(stored())


@posix
def test_ctrl_c_during_a_search_prints_no_traceback(run: Run, server: EmbeddingServer) -> None:
    run("ingest", write("a.txt", "x"), "--to", "v.db")
    held = Held(wanted=1)
    server.faults = script([], then=held)
    try:
        with process("search", "v.db", "x") as child:
            held.wait()
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=30)
    finally:
        held.released.set()
    assert (child.returncode, out, err) == (130, "", "")


def test_a_signal_ends_a_run_well_although_standard_error_is_full(server: EmbeddingServer) -> None:
    server.latency_s = 0.2
    records(20_000)
    line = "asyncembed ingest records.jsonl --to v.db --concurrency 1 2>/dev/full & pid=$!"
    done = shell(f"{line}; while ! test -s v.db-wal; do :; done; kill -TERM $pid; wait $pid")
    assert done.returncode == 143
    assert b" stored, " in done.stdout


async def test_outside_the_main_thread_no_signal_is_handled() -> None:
    def elsewhere() -> int:
        async def enter() -> int:
            with Interrupts(lambda: None) as interrupt:
                return interrupt.exit_code

        return asyncio.run(enter())

    before = signal.getsignal(signal.SIGTERM)
    assert await asyncio.to_thread(elsewhere) == 0
    assert signal.getsignal(signal.SIGTERM) is before
