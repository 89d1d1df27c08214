"""The command: what it prints, where, and its exit codes. As a process of its own where signals matter."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import asyncembed
from asyncembed.cli import display
from asyncembed.cli import signals as interrupts
from asyncembed.cli.commands import command
from asyncembed.report import IngestReport, Progress
from asyncembed.testing import (
    Disconnect,
    EmbeddingServer,
    Fault,
    InvalidKey,
    QuotaExceeded,
    RateLimited,
    Shuffled,
    WrongCount,
    embedding_of,
    poison,
    script,
)
from asyncembed.types import Failure, Hit

Run = Callable[..., Result]


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


def write(name: str, content: str) -> str:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return name


def records(count: int, name: str = "records.jsonl") -> str:
    lines = (json.dumps({"id": number, "text": f"text {number}"}) for number in range(count))
    return write(name, "\n".join(lines))


def stored(path: str = "v.db") -> dict[str, str]:
    connection = sqlite3.connect(path)
    try:
        return dict(connection.execute("SELECT id, text FROM embeddings"))
    finally:
        connection.close()


DOCS = "# Cats\n\nCats purr and sleep.\n\n# Rockets\n\nRockets fly to the moon.\n"


# ---- the main job ----


def test_a_folder_is_ingested_found_again_and_skipped_the_second_time(run: Run) -> None:
    write("docs/a.md", DOCS)
    first = run("ingest", "docs", "--to", "v.db", "--model", "local")
    assert first.exit_code == 0
    assert first.stdout.startswith("2 stored, 0 skipped, 0 failed; ")
    again = run("ingest", "docs", "--to", "v.db", "--model", "local")
    assert again.exit_code == 0
    assert again.stdout.startswith("0 stored, 2 skipped, 0 failed; 0 tokens in 0 requests")
    found = run("search", "v.db", "space travel", "-k", "1")
    assert found.exit_code == 0
    assert found.stdout.splitlines()[0].split()[1] == "docs/a.md#rockets-1"
    assert found.stdout.splitlines()[1:] == [" " * 9 + "# Rockets", " " * 9 + "Rockets fly to the moon."]
    assert first.stderr == again.stderr == found.stderr == ""


def test_a_changed_section_alone_is_sent_again(run: Run, server: EmbeddingServer) -> None:
    write("a.md", DOCS)
    run("ingest", "a.md", "--to", "v.db")
    write("a.md", DOCS.replace("moon", "stars"))
    assert run("ingest", "a.md", "--to", "v.db").stdout.startswith("1 stored, 1 skipped, 0 failed; ")
    assert [request.texts for request in server.requests][1:] == [("# Rockets\n\nRockets fly to the stars.",)]


def test_standard_input_is_json_lines(run: Run, server: EmbeddingServer) -> None:
    result = run("ingest", "-", "--to", "v.db", input='{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    assert result.exit_code == 0
    assert stored() == {"1": "a", "2": "b"}


def test_fields_size_and_model_are_passed_on(run: Run, server: EmbeddingServer) -> None:
    write("a.csv", "key,body\nk,hello\n")
    options = ["--id-field", "key", "--text-field", "body", "--model", "m", "--dimensions", "4"]
    assert run("ingest", "a.csv", "--to", "sqlite:///v.db", *options).exit_code == 0
    assert stored() == {"k": "hello"}
    (request,) = server.requests
    assert (request.model, request.dimensions, request.texts) == ("m", 4, ("hello",))


def test_chunk_tokens_bounds_the_pieces(run: Run, server: EmbeddingServer) -> None:
    write("a.txt", "one two three four five six seven eight")
    run("ingest", "a.txt", "--to", "v.db", "--chunk-tokens", "4")
    assert stored() == {"a.txt#1": "one two three four", "a.txt#2": "five six seven eight"}


def test_concurrency_bounds_the_requests_under_way(run: Run, server: EmbeddingServer) -> None:
    run("ingest", records(9_000), "--to", "v.db", "--concurrency", "2")
    assert len(server.requests) == 5
    assert server.max_in_flight <= 2
    assert len(stored()) == 9_000


def test_a_folder_of_nothing_is_no_error_but_said(run: Run) -> None:
    Path("pictures").mkdir()
    result = run("ingest", "pictures", "--to", "v.db", "--model", "local")
    assert result.exit_code == 0
    assert result.stdout.startswith("0 stored, 0 skipped, 0 failed; ")
    assert result.stderr.startswith("pictures: no file in it ends in one of .csv ")


# ---- what fails ----


def test_failed_records_are_listed_with_their_reasons_and_the_good_ones_stored(
    run: Run, server: EmbeddingServer
) -> None:
    server.faults = poison("bad")
    write("a.jsonl", '{"id": 1, "text": "good"}\n{"id": 2, "text": "bad"}\n{oops\n{"id": 4}\n')
    result = run("ingest", "a.jsonl", "--to", "v.db")
    assert result.exit_code == 1
    assert result.stdout.startswith("1 stored, 0 skipped, 3 failed; ")
    refused, broken, empty = result.stderr.splitlines()
    assert refused.startswith("failed: 2: ")
    assert broken.startswith("failed: a.jsonl line 3: is not JSON")
    assert empty == 'failed: 4: a.jsonl line 4: field "text" is missing or null'
    assert stored() == {"1": "good"}


def test_of_many_failures_the_first_are_listed_and_the_others_counted(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", "oops\n" * 17)
    result = run("ingest", "a.jsonl", "--to", "v.db")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 11
    assert result.stderr.splitlines()[-1] == "failed: 7 more"


def test_a_bad_day_ends_with_every_record_stored_once(run: Run, server: EmbeddingServer) -> None:
    server.faults = script(
        [RateLimited(0.05, {"retry-after-ms": "50"}), Shuffled(), WrongCount(-1), Disconnect("mid-body")]
    )
    result = run("ingest", records(4_500), "--to", "v.db", "--concurrency", "1")
    assert result.exit_code == 0
    assert result.stdout.startswith("4,500 stored, 0 skipped, 0 failed; ")
    assert "asyncembed: pausing for" in result.stderr
    assert stored() == {str(number): f"text {number}" for number in range(4_500)}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_quota_that_ends_keeps_what_is_stored_and_says_how_to_go_on(
    run: Run, server: EmbeddingServer, as_json: bool
) -> None:
    server.faults = script([None], then=QuotaExceeded())
    arguments = ["ingest", records(5_000), "--to", "v.db", "--concurrency", "1"]
    result = run(*arguments, *(["--json"] if as_json else []))
    assert result.exit_code == 1
    assert len(stored()) == 2_048
    if as_json:
        document = json.loads(result.stdout)
        assert document["success_count"] == 2_048
        assert document["error"]["error"] == "QuotaError"
        assert result.stderr == ""
    else:
        assert "2,048 stored" in result.stdout
        error, hint = result.stderr.splitlines()[-2:]
        assert error.startswith("asyncembed: ")
        assert hint == "asyncembed: run the same command again to go on: what is stored is skipped"
    server.faults = script([])
    assert run(*arguments).stdout.startswith("2,952 stored, 2,048 skipped, 0 failed; ")


def test_a_wrong_key_is_one_line_and_not_shown(
    run: Run, server: EmbeddingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = script([], then=InvalidKey())
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    result = run("ingest", records(3), "--to", "v.db")
    assert result.exit_code == 1
    assert "canary" not in result.output
    assert "Traceback" not in result.output


# ---- wrong use ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["ingest", "nowhere", "--to", "v.db"], "no such file or folder", id="unknown source"),
        pytest.param(["ingest", "nowhere/*.md", "--to", "v.db"], "nothing matches: nowhere/*.md", id="empty glob"),
        pytest.param(["ingest", "a.txt", "--to", "a.txt"], "a.txt is a source and the target", id="target is source"),
        pytest.param(["ingest", "a.txt", "--to", "b.txt"], "b.txt is not an SQLite database", id="no database"),
        pytest.param(["ingest", "a.txt", "--to", "folder"], "folder is a folder", id="target is a folder"),
        pytest.param(["ingest", "a.txt", "--to", "no/v.db"], "there is no folder", id="no folder for the target"),
        pytest.param(["ingest", "a.txt", "--to", "redis://x"], "no sink for addresses", id="unknown kind of target"),
        pytest.param(["ingest", "a.txt"], "Missing option '--to'", id="no target"),
        pytest.param(["ingest", "--to", "v.db"], "Missing argument 'SOURCE...'", id="no source"),
        pytest.param(["ingest", "a.txt", "--to", "v.db", "--concurrency", "0"], "--concurrency", id="concurrency 0"),
        pytest.param(["ingest", "a.txt", "--to", "v.db", "--chunk-tokens", "0"], "--chunk-tokens", id="chunks of 0"),
        pytest.param(["ingest", "a.txt", "--to", "v.db", "--dimensions", "x"], "--dimensions", id="no number"),
        pytest.param(["ingest", "a.txt", "--to", "v.db", "--dimensions", "7"], "dimensions=7", id="size of no model"),
        pytest.param(["ingest", "a.txt", "--to", "v.db", "--api-key", "k"], "No such option", id="a key in argv"),
        pytest.param(["search", "new.db", "q"], "does not exist yet", id="search in nothing"),
        pytest.param(["search", "b.txt", "q"], "is not an SQLite database", id="search in no database"),
        pytest.param(["search", "new.db", ""], "the query is empty", id="empty query"),
        pytest.param(["search", "new.db", "q", "-k", "0"], "'-k'", id="k of 0"),
        pytest.param(["plan", "nowhere"], "no such file or folder", id="plan of nothing"),
        pytest.param(["frobnicate"], "No such command", id="unknown command"),
    ],
)
def test_wrong_use_is_told_in_a_line_and_exits_with_2(run: Run, arguments: list[str], message: str) -> None:
    write("a.txt", "some text")
    write("b.txt", "some other text")
    Path("folder").mkdir()
    model = ["--model", "local"] if arguments[0] in ("ingest", "plan") else []
    result = run(*arguments, *model)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert Path("a.txt").read_text() == "some text"


def test_without_a_key_nothing_is_opened(run: Run) -> None:
    result = run("ingest", write("a.txt", "x"), "--to", "v.db")
    assert result.exit_code == 2
    assert "OPENAI_API_KEY" in result.stderr
    assert not Path("v.db").exists()


def test_an_unknown_source_costs_nothing_though_others_are_good(run: Run, server: EmbeddingServer) -> None:
    assert run("ingest", write("a.txt", "x"), "nowhere", "--to", "v.db").exit_code == 2
    assert server.requests == []


def test_other_vectors_than_those_stored_are_refused_before_a_text_is_sent(run: Run, server: EmbeddingServer) -> None:
    arguments = ["ingest", write("a.txt", "x"), "--to", "v.db", "--dimensions"]
    assert run(*arguments, "4").exit_code == 0
    write("a.txt", "y")
    result = run(*arguments, "2")
    assert result.exit_code == 2
    assert "4" in result.stderr
    assert len(server.requests) == 1


# ---- search ----


def test_search_takes_the_model_and_the_size_from_the_store(run: Run, server: EmbeddingServer) -> None:
    run("ingest", write("a.txt", "x"), "--to", "v.db", "--model", "text-embedding-3-small", "--dimensions", "4")
    assert run("search", "v.db", "x").exit_code == 0
    assert (server.requests[-1].model, server.requests[-1].dimensions) == ("text-embedding-3-small", 4)


def test_search_asks_which_of_several_models_is_meant(run: Run, server: EmbeddingServer) -> None:
    write("a.txt", "x")
    run("ingest", "a.txt", "--to", "v.db", "--model", "one")
    run("ingest", "a.txt", "--to", "v.db", "--model", "two")
    asked = len(server.requests)
    unsaid, unknown, said = (run("search", "v.db", "x", *model) for model in ([], ["--model", "3"], ["--model", "two"]))
    assert unsaid.exit_code == unknown.exit_code == 2
    assert "one (8 dimensions), two (8 dimensions)" in unsaid.stderr
    assert "one (8 dimensions), two (8 dimensions)" in unknown.stderr
    assert said.exit_code == 0
    assert [request.model for request in server.requests[asked:]] == ["two"]


def test_search_prints_one_json_document(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", '{"id": "é", "text": "hello", "tag": 1}')
    run("ingest", "a.jsonl", "--to", "v.db", "--model", "m")
    document = json.loads(run("search", "v.db", "hello", "--json").stdout)
    (hit,) = document["hits"]
    assert hit.pop("score") == pytest.approx(1.0)
    assert document == {"model": "m", "hits": [{"id": "é", "text": "hello", "metadata": {"tag": 1}}]}


def test_search_shows_the_nearest_first_and_no_more_than_asked(run: Run, server: EmbeddingServer) -> None:
    run("ingest", records(50), "--to", "v.db", "--model", "m")
    query = embedding_of("q", dimensions=8, model="m")
    scores = {str(n): float(query @ embedding_of(f"text {n}", dimensions=8, model="m")) for n in range(50)}
    lines = run("search", "v.db", "q", "-k", "3").stdout.splitlines()[::2]
    assert [line.split()[1] for line in lines] == sorted(scores, key=lambda id: -scores[id])[:3]


# ---- plan ----


def test_plan_sends_nothing_and_needs_no_key(run: Run) -> None:
    result = run("plan", records(2_049))
    assert result.exit_code == 0
    assert "2,049 texts" in result.stdout
    assert "2 requests" in result.stdout
    assert "$" in result.stdout


def test_plan_prints_one_json_document_and_fails_for_what_would_fail(run: Run) -> None:
    write("a.jsonl", '{"id": 1, "text": "hello"}\n{"id": 2}\n')
    result = run("plan", "a.jsonl", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    (failure,) = document.pop("failures")
    assert failure["index"] == 1
    assert failure["id"] == 2
    assert (document["texts"], document["requests"], document["tokens"]) == (1, 1, 1)


# ---- json ----


def test_json_is_all_that_is_printed(run: Run, server: EmbeddingServer) -> None:
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


# ---- prune ----


def test_prune_deletes_what_is_gone_from_the_sources(run: Run, server: EmbeddingServer) -> None:
    write("docs/a.md", DOCS)
    write("docs/b.md", DOCS)
    run("ingest", "docs", "--to", "v.db")
    Path("docs/a.md").unlink()
    assert run("ingest", "docs", "--to", "v.db").stdout.startswith("0 stored, 2 skipped, 0 failed; ")
    assert len(stored()) == 4
    again = run("ingest", "docs", "--to", "v.db", "--prune", "--json")
    assert (again.exit_code, json.loads(again.stdout)["pruned_count"]) == (0, 2)
    assert sorted(stored()) == ["docs/b.md#cats-1", "docs/b.md#rockets-1"]


def test_prune_deletes_nothing_where_a_record_is_unreadable_and_says_so(run: Run, server: EmbeddingServer) -> None:
    run("ingest", records(3), "--to", "v.db")
    write("records.jsonl", '{"id": 1, "text": "text 1"}\noops\n')
    result = run("ingest", "records.jsonl", "--to", "v.db", "--prune")
    assert result.exit_code == 1
    assert "nothing was pruned: 1 records failed without an id, and any row might be theirs" in result.stderr
    assert len(stored()) == 3


# ---- as a process of its own ----


@dataclass
class Held(Fault):
    """An answer that waits until the test lets it go."""

    wanted: int
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    released: threading.Event = field(default_factory=threading.Event)

    async def send(self, wire: Any, answer: Any) -> None:
        self.begun.release()
        await asyncio.to_thread(self.released.wait)
        await wire.send(answer)

    def wait(self) -> None:
        """Wait until as many requests are under way as are wanted."""
        for _ in range(self.wanted):
            assert self.begun.acquire(timeout=30)


@contextmanager
def process(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    popen = subprocess.Popen(
        [sys.executable, "-m", "asyncembed", *arguments],
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        **options,
    )
    with popen:
        try:
            yield popen
        finally:
            popen.kill()


posix = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


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
        assert child.stderr.readline().startswith("asyncembed: finishing what is under way and storing it")
        held.released.set()
        out, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert out.startswith("4,096 stored, 0 skipped, 0 failed; ")
    assert err == "asyncembed: run the same command again to go on: what is stored is skipped\n"
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
    assert err == "asyncembed: stopped; run the same command again to go on: what is stored is skipped\n"
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
def test_ctrl_c_while_searching_is_no_traceback(run: Run, server: EmbeddingServer) -> None:
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


@posix
def test_a_terminal_gets_a_bar_with_rate_and_total(server: EmbeddingServer) -> None:
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


def test_a_reader_that_leaves_early_gets_no_traceback(run: Run, server: EmbeddingServer) -> None:
    run("ingest", records(2_000), "--to", "v.db")
    with process("search", "v.db", "x", "-k", "2000") as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == ""


def test_an_output_that_cannot_show_a_letter_ends_no_run(run: Run) -> None:
    write("a.jsonl", '{"id": "日本", "text": "naïve"}')
    run("ingest", "a.jsonl", "--to", "v.db", "--model", "local")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    with process("search", "v.db", "x", env=environment) as child:
        out, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (0, "")
    assert r"\u65e5\u672c" in out


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_extra_the_command_says_how_to_get_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from asyncembed.cli import main; main()"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 2
    assert child.stderr == 'asyncembed: the command needs click and rich: pip install "asyncembed[cli]"\n'


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version").stdout == f"asyncembed, version {asyncembed.__version__}\n"


# ---- the parts ----


def test_nothing_that_is_shown_is_obeyed_by_a_terminal() -> None:
    hits = [Hit("a\x1b[2J", 0.5, "\x1b]0;owned\x07 text\u202e\nsecond\nthird"), Hit("b", -0.25, None)]
    shown = [display.printable(line) for line in display.hit_lines(hits)]
    assert shown == [
        r" 0.5000  a\x1b[2J",
        r"         \x1b]0;owned\x07 text\u202e",
        "         second",
        "-0.2500  b",
    ]


def test_lines_come_no_more_often_than_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    lines = display.Lines()
    for second in range(12):
        lines.update(Progress(second, None, 0, 0, 0, 0, 0, elapsed_s=float(second)))
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["5", "10"]


def test_an_estimate_never_says_less_than_what_is_done() -> None:
    progress = Progress(10, None, 0, 0, 0, 0, 0, 1.0)
    assert display.with_total(progress, 7).total == 10
    assert display.with_total(progress, 12).total == 12
    assert display.with_total(progress, None).total is None


def test_a_failure_without_an_id_is_named_by_its_position() -> None:
    failures = [Failure(4, asyncembed.TooLongError("has 9 tokens", tokens=9, limit=8))]
    assert list(display.failure_lines(failures)) == ["failed: record 4: has 9 tokens"]


def test_the_json_of_a_report_tells_of_what_ended_it() -> None:
    document = display.report_document(IngestReport(), "SIGINT", asyncembed.QuotaError("no money"))
    assert document["stopped_by"] == "SIGINT"
    assert document["error"] == {"error": "QuotaError", "message": "no money"}


async def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def elsewhere() -> int:
        async def enter() -> int:
            with interrupts.Interrupts(lambda: None) as interrupt:
                return interrupt.exit_code

        return asyncio.run(enter())

    before = signal.getsignal(signal.SIGTERM)
    assert await asyncio.to_thread(elsewhere) == 0
    assert signal.getsignal(signal.SIGTERM) is before


# ---- standard streams that are not what they mostly are ----


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of shell in which `asyncembed` is our command."""
    line = line.replace("asyncembed", f"{sys.executable} -m asyncembed")
    return subprocess.run(line, shell=True, capture_output=True, timeout=30, env=os.environ | environment)


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full"])
def test_nobody_need_read_standard_error(redirect: str) -> None:
    write("a.csv", "id,text\n1,one\n2,\n")
    done = shell(f"asyncembed ingest a.csv --to v.db --model local {redirect}")
    assert (done.returncode, done.stderr) == (1, b"")
    assert done.stdout.startswith(b"1 stored, 0 skipped, 1 failed")


def test_a_signal_ends_a_run_well_whose_standard_error_is_gone(server: EmbeddingServer) -> None:
    server.latency_s = 0.2
    records(20_000)
    line = "asyncembed ingest records.jsonl --to v.db --concurrency 1 2>/dev/full & pid=$!"
    done = shell(f"{line}; while ! test -s v.db-wal; do :; done; kill -TERM $pid; wait $pid")
    assert done.returncode == 143
    assert b" stored, " in done.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_a_document_is_json_in_every_encoding(encoding: str) -> None:
    write("a.csv", "id,text\n😀,ein Schiff für 5 €\n")
    assert shell("asyncembed ingest a.csv --to v.db --model local").returncode == 0
    done = shell("asyncembed search v.db Schiff --json", PYTHONIOENCODING=encoding)
    (hit,) = json.loads(done.stdout.decode(encoding))["hits"]
    assert (hit["id"], hit["text"]) == ("😀", "ein Schiff für 5 €")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("asyncembed plan a.csv >/dev/full", 1, b"asyncembed: the output cannot be written"),
        ("asyncembed plan - <&-", 1, b"there is no standard input"),
        ("asyncembed plan a.csv --chunk-tokens 99999999999999999999999", 2, b"chunk-tokens"),
    ],
)
def test_streams_and_numbers_that_cannot_be_are_told_in_a_line(line: str, code: int, words: bytes) -> None:
    write("a.csv", "id,text\n1,one\n")
    done = shell(line)
    assert words in done.stderr
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


def test_a_title_that_is_no_text_is_refused_as_the_library_does(run: Run) -> None:
    write("a.jsonl", '{"id": 1, "title": "T", "content": 0}\n{"id": 2, "title": [], "content": "c"}\n')
    result = run("ingest", "a.jsonl", "--to", "v.db", "--model", "local")
    assert result.stdout.startswith("0 stored, 0 skipped, 2 failed")


def test_json_tells_what_was_wrong_before_anything_was_done(run: Run, server: EmbeddingServer) -> None:
    result = run("ingest", "missing.md", "--to", "v.db", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["seen"], document["error"]["error"]) == (2, 0, "ConfigError")
    result = run("search", "v.db", "query", "--json")
    assert json.loads(result.stdout).keys() == {"error"}
    result = run("plan", "missing.md", "--json")
    assert json.loads(result.stdout).keys() == {"error"}


def test_a_plan_takes_the_options_of_an_ingest(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", '{"id": 1, "text": "a"}\n')
    options = ("--base-url", server.base_url, "--concurrency", "2", "--dimensions", "8")
    assert run("plan", "a.jsonl", *options).exit_code == 0
    assert server.requests == []


def test_nothing_is_pruned_where_a_folder_is_empty(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", '{"id": 1, "text": "a"}\n')
    assert run("ingest", "a.jsonl", "--to", "v.db").exit_code == 0
    Path("unmounted").mkdir()
    result = run("ingest", "unmounted", "--to", "v.db", "--prune")
    assert (result.exit_code, "unmounted holds no file" in result.stderr) == (2, True)
    assert run("ingest", "a.jsonl", "--to", "v.db").stdout.startswith("0 stored, 1 skipped")


def test_equal_fields_and_empty_targets_are_refused(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", '{"id": 1, "text": "a"}\n')
    assert run("ingest", "a.jsonl", "--to", "v.db", "--id-field", "text").exit_code == 2
    result = run("ingest", "a.jsonl", "--to", "")
    assert (result.exit_code, "is empty" in result.stderr) == (2, True)
