"""`ingest`, `search` and `plan`: the work they do, their options and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import asyncembed
from asyncembed.testing import (
    Disconnect,
    EmbeddingServer,
    InvalidKey,
    QuotaExceeded,
    RateLimited,
    Shuffled,
    WrongCount,
    embedding_of,
    poison,
    script,
)
from tests.cli.helpers import DOCS, Run, records, stored, write
from tests.cli.processes import shell

# ---- ingest ----


def test_a_folder_is_ingested_searched_and_skipped_the_second_time(run: Run) -> None:
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


def test_only_a_changed_section_is_sent_again(run: Run, server: EmbeddingServer) -> None:
    write("a.md", DOCS)
    run("ingest", "a.md", "--to", "v.db")
    write("a.md", DOCS.replace("moon", "stars"))
    assert run("ingest", "a.md", "--to", "v.db").stdout.startswith("1 stored, 1 skipped, 0 failed; ")
    assert [request.texts for request in server.requests][1:] == [("# Rockets\n\nRockets fly to the stars.",)]


def test_fields_size_and_model_are_passed_on(run: Run, server: EmbeddingServer) -> None:
    write("a.csv", "key,body\nk,hello\n")
    options = ["--id-field", "key", "--text-field", "body", "--model", "m", "--dimensions", "4"]
    assert run("ingest", "a.csv", "--to", "sqlite:///v.db", *options).exit_code == 0
    assert stored() == {"k": "hello"}
    (request,) = server.requests
    assert (request.model, request.dimensions, request.texts) == ("m", 4, ("hello",))


def test_chunk_tokens_limits_the_chunks(run: Run, server: EmbeddingServer) -> None:
    write("a.txt", "one two three four five six seven eight")
    run("ingest", "a.txt", "--to", "v.db", "--chunk-tokens", "4")
    assert stored() == {"a.txt#1": "one two three four", "a.txt#2": "five six seven eight"}


def test_a_text_that_is_too_long_fails_and_the_message_names_the_option_to_embed_it(
    run: Run, server: EmbeddingServer
) -> None:
    write("a.jsonl", json.dumps({"id": 1, "text": "word " * 10_000}))
    refused = run("ingest", "a.jsonl", "--to", "v.db")
    assert refused.exit_code == 1
    assert "or choose --too-long " in refused.stderr
    assert server.requests == []
    assert run("ingest", "a.jsonl", "--to", "v.db", "--too-long", "truncate").exit_code == 0
    assert list(stored()) == ["1"]


def test_concurrency_limits_the_requests_under_way(run: Run, server: EmbeddingServer) -> None:
    run("ingest", records(9_000), "--to", "v.db", "--concurrency", "2")
    assert len(server.requests) == 5
    assert server.max_in_flight <= 2
    assert len(stored()) == 9_000


def test_failed_records_are_listed_with_their_reasons_and_good_ones_are_stored(
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


def test_every_record_is_stored_once_despite_faults_of_the_provider(run: Run, server: EmbeddingServer) -> None:
    server.faults = script(
        [RateLimited(0.05, {"retry-after-ms": "50"}), Shuffled(), WrongCount(-1), Disconnect("mid-body")]
    )
    result = run("ingest", records(4_500), "--to", "v.db", "--concurrency", "1")
    assert result.exit_code == 0
    assert result.stdout.startswith("4,500 stored, 0 skipped, 0 failed; ")
    assert "asyncembed: pausing for" in result.stderr
    assert stored() == {str(number): f"text {number}" for number in range(4_500)}


@pytest.mark.parametrize("as_json", [False, True])
def test_an_exhausted_quota_keeps_stored_records_and_says_how_to_go_on(
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
        assert hint == "asyncembed: run the same command again to go on: stored records are skipped"
    server.faults = script([])
    assert run(*arguments).stdout.startswith("2,952 stored, 2,048 skipped, 0 failed; ")


def test_a_wrong_key_is_reported_in_one_line_that_does_not_show_it(
    run: Run, server: EmbeddingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = script([], then=InvalidKey())
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    result = run("ingest", records(3), "--to", "v.db")
    assert result.exit_code == 1
    assert "canary" not in result.output
    assert "Traceback" not in result.output


def test_vectors_of_another_size_are_refused_before_a_text_is_sent(run: Run, server: EmbeddingServer) -> None:
    arguments = ["ingest", write("a.txt", "x"), "--to", "v.db", "--dimensions"]
    assert run(*arguments, "4").exit_code == 0
    write("a.txt", "y")
    result = run(*arguments, "2")
    assert result.exit_code == 2
    assert "4" in result.stderr
    assert len(server.requests) == 1


def test_a_title_that_is_not_a_text_is_refused(run: Run) -> None:
    write("a.jsonl", '{"id": 1, "title": "T", "content": 0}\n{"id": 2, "title": [], "content": "c"}\n')
    result = run("ingest", "a.jsonl", "--to", "v.db", "--model", "local")
    assert result.stdout.startswith("0 stored, 0 skipped, 2 failed")


# ---- prune ----


def test_prune_deletes_rows_that_are_gone_from_the_sources(run: Run, server: EmbeddingServer) -> None:
    write("docs/a.md", DOCS)
    write("docs/b.md", DOCS)
    run("ingest", "docs", "--to", "v.db")
    Path("docs/a.md").unlink()
    assert run("ingest", "docs", "--to", "v.db").stdout.startswith("0 stored, 2 skipped, 0 failed; ")
    assert len(stored()) == 4
    again = run("ingest", "docs", "--to", "v.db", "--prune", "--json")
    assert (again.exit_code, json.loads(again.stdout)["pruned_count"]) == (0, 2)
    assert sorted(stored()) == ["docs/b.md#cats-1", "docs/b.md#rockets-1"]


def test_prune_deletes_nothing_if_a_record_is_unreadable_and_says_so(run: Run, server: EmbeddingServer) -> None:
    run("ingest", records(3), "--to", "v.db")
    write("records.jsonl", '{"id": 1, "text": "text 1"}\noops\n')
    result = run("ingest", "records.jsonl", "--to", "v.db", "--prune")
    assert result.exit_code == 1
    assert "nothing was pruned: 1 records failed without an id, and any row might be theirs" in result.stderr
    assert len(stored()) == 3


def test_nothing_is_pruned_if_a_folder_is_empty(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", '{"id": 1, "text": "a"}\n')
    assert run("ingest", "a.jsonl", "--to", "v.db").exit_code == 0
    Path("unmounted").mkdir()
    result = run("ingest", "unmounted", "--to", "v.db", "--prune")
    assert (result.exit_code, "unmounted holds no file" in result.stderr) == (2, True)
    assert run("ingest", "a.jsonl", "--to", "v.db").stdout.startswith("0 stored, 1 skipped")


# ---- search ----


def test_search_takes_the_model_and_the_size_from_the_store(run: Run, server: EmbeddingServer) -> None:
    run("ingest", write("a.txt", "x"), "--to", "v.db", "--model", "text-embedding-3-small", "--dimensions", "4")
    assert run("search", "v.db", "x").exit_code == 0
    assert (server.requests[-1].model, server.requests[-1].dimensions) == ("text-embedding-3-small", 4)


def test_search_asks_for_the_model_if_the_store_has_several(run: Run, server: EmbeddingServer) -> None:
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


def test_search_shows_the_nearest_first_and_at_most_k(run: Run, server: EmbeddingServer) -> None:
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


def test_plan_prints_one_json_document_and_fails_if_a_record_would_fail(run: Run) -> None:
    write("a.jsonl", '{"id": 1, "text": "hello"}\n{"id": 2}\n')
    result = run("plan", "a.jsonl", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    (failure,) = document.pop("failures")
    assert failure["index"] == 1
    assert failure["id"] == 2
    assert (document["texts"], document["requests"], document["tokens"]) == (1, 1, 1)


def test_plan_accepts_the_options_of_ingest(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", '{"id": 1, "text": "a"}\n')
    options = ("--base-url", server.base_url, "--concurrency", "2", "--dimensions", "8")
    assert run("plan", "a.jsonl", *options).exit_code == 0
    assert server.requests == []


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
        pytest.param(["ingest", "a.txt", "--to", "v.db", "--dimensions", "7"], "--dimensions 7", id="unknown size"),
        pytest.param(["ingest", "a.txt", "--to", "v.db", "--api-key", "k"], "No such option", id="a key in argv"),
        pytest.param(["search", "new.db", "q"], "does not exist yet", id="search in nothing"),
        pytest.param(["search", "b.txt", "q"], "is not an SQLite database", id="search in no database"),
        pytest.param(["search", "new.db", ""], "the query is empty", id="empty query"),
        pytest.param(["search", "new.db", "q", "-k", "0"], "'-k'", id="k of 0"),
        pytest.param(["plan", "nowhere"], "no such file or folder", id="plan of nothing"),
        pytest.param(["frobnicate"], "No such command", id="unknown command"),
    ],
)
def test_wrong_use_is_reported_in_one_line_and_exits_with_2(run: Run, arguments: list[str], message: str) -> None:
    write("a.txt", "some text")
    write("b.txt", "some other text")
    Path("folder").mkdir()
    model = ["--model", "local"] if arguments[0] in ("ingest", "plan") else []
    result = run(*arguments, *model)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert Path("a.txt").read_text() == "some text"


def test_without_a_key_no_target_is_created(run: Run) -> None:
    result = run("ingest", write("a.txt", "x"), "--to", "v.db")
    assert result.exit_code == 2
    assert "no API key: set OPENAI_API_KEY, or use the embedded model, --model local" in result.stderr
    assert not Path("v.db").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "local", "--dimensions", "7"], "--dimensions 7;"),
        (["--base-url", "http://host.example/v1"], "--base-url would send key and texts in clear"),
        (["--base-url", "http://host.example/v1"], "or --allow-insecure-http if"),
        (["--model", "local", "--id-field", "text"], "--id-field and --text-field are both"),
    ],
)
def test_messages_name_the_options_of_the_command(run: Run, options: list[str], named: str) -> None:
    result = run("ingest", write("a.txt", "x"), "--to", "v.db", *options)
    assert result.exit_code == 2
    assert named in result.stderr


def test_equal_fields_and_empty_targets_are_refused(run: Run, server: EmbeddingServer) -> None:
    write("a.jsonl", '{"id": 1, "text": "a"}\n')
    assert run("ingest", "a.jsonl", "--to", "v.db", "--id-field", "text").exit_code == 2
    result = run("ingest", "a.jsonl", "--to", "")
    assert (result.exit_code, "is empty" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("asyncembed plan a.csv >/dev/full", 1, b"asyncembed: the output cannot be written"),
        ("asyncembed plan - <&-", 1, b"there is no standard input"),
        ("asyncembed plan a.csv --chunk-tokens 99999999999999999999999", 2, b"chunk-tokens"),
    ],
)
def test_unusable_streams_and_numbers_are_reported_in_one_line(line: str, code: int, words: bytes) -> None:
    write("a.csv", "id,text\n1,one\n")
    done = shell(line)
    assert words in done.stderr
    assert done.returncode == code
    assert b"Traceback" not in done.stderr


def test_an_error_before_the_first_record_is_a_json_document_as_well(run: Run, server: EmbeddingServer) -> None:
    result = run("ingest", "missing.md", "--to", "v.db", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["seen"], document["error"]["error"]) == (2, 0, "ConfigError")
    result = run("search", "v.db", "query", "--json")
    assert json.loads(result.stdout).keys() == {"error"}
    result = run("plan", "missing.md", "--json")
    assert json.loads(result.stdout).keys() == {"error"}


# ---- the command itself ----


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_its_extra_the_command_says_how_to_install_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from asyncembed.cli import main; main()"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 2
    assert child.stderr == 'asyncembed: the command needs click and rich: pip install "asyncembed[cli]"\n'


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version").stdout == f"asyncembed, version {asyncembed.__version__}\n"
