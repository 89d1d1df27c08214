"""The output of the command: on which stream, in which form, whatever the streams are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import asyncembed
from asyncembed.cli import display
from asyncembed.report import IngestReport, Progress
from asyncembed.testing import EmbeddingServer, script
from asyncembed.types import Failure, Hit
from tests.cli.helpers import Run, records, write
from tests.cli.processes import Held, posix, process, shell

# ---- failures and progress ----


def test_the_first_of_many_failures_are_listed_and_the_others_counted(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", "oops\n" * 17)
    result = run("ingest", "a.jsonl", "--to", "v.db")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 11
    assert result.stderr.splitlines()[-1] == "failed: 7 more"


def test_a_failure_without_an_id_is_named_by_its_position() -> None:
    failures = [Failure(4, asyncembed.TooLongError("has 9 tokens", tokens=9, limit=8))]
    assert list(display.failure_lines(failures)) == ["failed: record 4: has 9 tokens"]


def test_progress_lines_are_some_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = display.Lines()
    for second in range(12):
        lines.update(Progress(second, None, 0, 0, 0, 0, 0, elapsed_s=float(second)))
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["5", "10"]


def test_an_estimated_total_is_at_least_the_number_done() -> None:
    progress = Progress(10, None, 0, 0, 0, 0, 0, 1.0)
    assert display.with_total(progress, 7).total == 10
    assert display.with_total(progress, 12).total == 12
    assert display.with_total(progress, None).total is None


@posix
def test_a_terminal_shows_a_bar_with_rate_and_total(server: EmbeddingServer) -> None:
    ours, theirs = os.openpty()
    held = Held(wanted=1)
    server.faults = script([None, None, held])
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    try:
        arguments = ["ingest", records(6_000), "--to", "v.db", "--concurrency", "1"]
        with process(*arguments, stderr=theirs, env=environment) as child:
            os.close(theirs)
            held.wait()
            shown = b""
            while b"4,096 of 6,000, " not in shown or b"/s" not in shown:
                shown += os.read(ours, 65_536)
            held.released.set()
            out, _ = child.communicate(timeout=30)
    finally:
        held.released.set()
        os.close(ours)
    assert child.returncode == 0
    assert out.startswith("6,000 stored")


# ---- JSON ----


def test_json_is_the_only_output(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", '{"id": 1, "text": "a"}\noops\n')
    Path("empty").mkdir()
    result = run("ingest", "a.jsonl", "empty", "--to", "v.db", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    document = json.loads(result.stdout)
    assert document.pop("elapsed_s") >= 0
    assert document.pop("failures") == [
        {
            "index": 1,
            "id": None,
            "error": "InvalidRecordError",
            "message": "a.jsonl line 2: is not JSON: expected value at column 1",
        }
    ]
    assert document == {
        "seen": 2,
        "success_count": 1,
        "skipped_count": 0,
        "failed_count": 1,
        "pruned_count": None,
        "total_tokens": 1,
        "requests": 1,
        "retries": 0,
        "cost_usd": pytest.approx(0.02e-6),
        "stopped_by": None,
        "error": None,
    }


def test_the_json_of_a_report_names_the_signal_and_the_error_that_ended_the_run() -> None:
    document = display.report_document(IngestReport(), "SIGINT", asyncembed.QuotaError("no money"))
    assert document["stopped_by"] == "SIGINT"
    assert document["error"] == {"error": "QuotaError", "message": "no money"}


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_document_is_json_in_every_encoding(encoding: str) -> None:
    write("a.csv", "id,text\n😀,ein Schiff für 5 €\n")
    assert shell("asyncembed ingest a.csv --to v.db --model local").returncode == 0
    done = shell("asyncembed search v.db Schiff --json", PYTHONIOENCODING=encoding)
    (hit,) = json.loads(done.stdout.decode(encoding))["hits"]
    assert (hit["id"], hit["text"]) == ("😀", "ein Schiff für 5 €")


# ---- terminals and streams ----


def test_no_output_can_control_the_terminal() -> None:
    hits = [Hit("a\x1b[2J", 0.5, "\x1b]0;owned\x07 text\u202e\nsecond\nthird"), Hit("b", -0.25, None)]
    shown = [display.printable(line) for line in display.hit_lines(hits)]
    assert shown == [
        r" 0.5000  a\x1b[2J",
        r"         \x1b]0;owned\x07 text\u202e",
        "         second",
        "-0.2500  b",
    ]


def test_a_reader_that_closes_the_pipe_early_gets_no_traceback(run: Run, server: EmbeddingServer) -> None:
    run("ingest", records(2_000), "--to", "v.db")
    with process("search", "v.db", "x", "-k", "2000") as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == ""


def test_an_encoding_without_a_letter_ends_no_run(run: Run) -> None:
    write("a.jsonl", '{"id": "日本", "text": "naïve"}')
    run("ingest", "a.jsonl", "--to", "v.db", "--model", "local")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    with process("search", "v.db", "x", env=environment) as child:
        out, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (0, "")
    assert r"\u65e5\u672c" in out


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full"])
def test_a_closed_or_full_standard_error_changes_no_result(redirect: str) -> None:
    write("a.csv", "id,text\n1,one\n2,\n")
    done = shell(f"asyncembed ingest a.csv --to v.db --model local {redirect}")
    assert (done.returncode, done.stderr) == (1, b"")
    assert done.stdout.startswith(b"1 stored, 0 skipped, 1 failed")


@pytest.mark.parametrize("message", ["base_url.md: Permission denied", "docs/base_url: is UTF-16", "got 4 dimensions"])
def test_words_that_are_not_options_of_the_library_stay_as_they_are(message: str) -> None:
    assert display.message_of(asyncembed.ConfigError(message)) == message
