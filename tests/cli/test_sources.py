"""The sources of the command: standard input, folders, files that do not exist."""

from __future__ import annotations

from pathlib import Path

from asyncembed.testing import EmbeddingServer
from tests.cli.helpers import Run, stored, write


def test_standard_input_is_json_lines(run: Run, server: EmbeddingServer) -> None:
    result = run("ingest", "-", "--to", "v.db", input='{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    assert result.exit_code == 0
    assert stored() == {"1": "a", "2": "b"}


def test_an_empty_folder_is_reported_but_is_not_an_error(run: Run) -> None:
    Path("pictures").mkdir()
    result = run("ingest", "pictures", "--to", "v.db", "--model", "local")
    assert result.exit_code == 0
    assert result.stdout.startswith("0 stored, 0 skipped, 0 failed; ")
    assert result.stderr.startswith("pictures: no file in it ends in one of .csv ")


def test_an_unknown_source_beside_good_ones_costs_nothing(run: Run, server: EmbeddingServer) -> None:
    assert run("ingest", write("a.txt", "x"), "nowhere", "--to", "v.db").exit_code == 2
    assert server.requests == []


def test_an_address_without_a_query_is_refused_without_showing_its_password(run: Run) -> None:
    address = "postgresql://me:hunter2@host/db"
    result = run("ingest", write("a.txt", "x"), address, "--to", "v.db", "--model", "local")
    assert result.exit_code == 2
    assert "a source in PostgreSQL needs a query" in result.stderr
    assert "hunter2" not in result.output
