"""The benchmarks themselves: the server's answers, the clients' measurements, and the tables."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import environments
from bench.clients import CLIENTS
from bench.corpus import sections
from bench.job import Job, Measured, Texts
from bench.report import Table, draw
from bench.run import measure, server
from bench.scenarios import SCENARIOS, Scenario
from bench.server import read_body, vectors

ROOT = environments.ROOT


def post(base_url: str, **fields: Any) -> Any:
    request = urllib.request.Request(f"{base_url}/embeddings", json.dumps({"model": "m", **fields}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def refused(base_url: str, **fields: Any) -> urllib.error.HTTPError:
    with pytest.raises(urllib.error.HTTPError) as error:
        post(base_url, **fields)
    error.value.close()
    return error.value


def stats(base_url: str, method: str = "GET") -> dict[str, int]:
    request = urllib.request.Request(base_url.removesuffix("/v1") + "/stats", method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, int] = json.load(answer)
    return found


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with server(["--dimensions", "256"]) as url:
        yield url


@pytest.fixture
def job(base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(environments, "CACHE", tmp_path)
    environments.variables.cache_clear()
    (tmp_path / "texts").write_text("\n".join(sections(300)))
    return Job("", base_url, str(tmp_path / "texts"), 300, dimensions=256, expected_dimensions=256, batch=100)


# ---- the server ----


@pytest.mark.parametrize(
    ("given", "count"),
    [
        pytest.param("one", 1, id="one text"),
        pytest.param('q"u[o]te\\', 1, id="one text with quotes and brackets"),
        pytest.param(["a", "b", "c"], 3, id="texts"),
        pytest.param([",", '","', '[",",","]'], 3, id="texts like separators"),
        pytest.param(["x\\", '"', '\\"]', "é\n"], 4, id="texts with escapes"),
        pytest.param(['"input":["a"]'], 1, id="a text like a body"),
        pytest.param([1, 2, 3], 1, id="the ids of one text"),
        pytest.param([[1, 2], [3]], 2, id="the ids of two texts"),
    ],
)
@pytest.mark.parametrize("style", [{}, {"separators": (",", ":")}, {"ensure_ascii": False}, {"indent": 1}], ids=str)
@pytest.mark.parametrize("last", ["input", "encoding_format"])
def test_inputs_are_counted_without_parsing(given: object, count: int, style: dict[str, Any], last: str) -> None:
    fields = {"model": "m", "input": given, "encoding_format": "base64"}
    fields[last] = fields.pop(last)
    asked = read_body(json.dumps(fields, **style).encode())
    assert (asked.inputs, asked.base64) == (count, True)


def test_texts_are_charged_by_bytes_and_token_ids_by_their_average_bytes() -> None:
    assert read_body(json.dumps({"input": ["a" * 400, "b" * 40]}).encode()).tokens == 110  # 440 / 4
    assert read_body(json.dumps({"input": [[5, 6, 7], [8]]}).encode()).tokens == 6  # 4 * 6.1 / 4


def test_a_text_of_the_corpus_costs_the_same_as_token_ids() -> None:
    toktok = pytest.importorskip("toktok")
    texts = sections(500)
    ids = [[0] * count for count in toktok.batch_count(texts, "cl100k_base", threads=1)]
    charged = [read_body(json.dumps({"input": given}).encode()).tokens for given in (texts, ids)]
    assert charged[0] == pytest.approx(charged[1], rel=0.01)


def test_a_body_without_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no input"):
        read_body(b'{"model":"m"}')


def test_each_input_gets_the_vector_of_its_index_in_base64(base_url: str) -> None:
    data = post(base_url, input=["a"] * 300, encoding_format="base64")["data"]
    assert [item["index"] for item in data] == list(range(300))
    rows = np.array([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in data])
    assert np.array_equal(rows, vectors(256)[np.arange(300) % 256])


def test_without_base64_the_same_vectors_are_sent_as_numbers(base_url: str) -> None:
    data = post(base_url, input=["a", "b"])["data"]
    assert np.array_equal(np.array([item["embedding"] for item in data], np.float32), vectors(256)[:2])


def test_more_inputs_than_the_limit_are_refused(base_url: str) -> None:
    assert refused(base_url, input=["a"] * 2_049).code == 400


def test_requests_are_counted_until_the_counts_are_reset(base_url: str) -> None:
    stats(base_url, "DELETE")
    post(base_url, input=["a" * 400, "b"])
    assert stats(base_url) == {"requests": 1, "refusals": 0, "inputs": 2, "tokens": 100}
    assert stats(base_url, "DELETE")["requests"] == 0


def test_a_request_over_the_token_limit_gets_429_with_retry_after() -> None:
    # 60 a minute is one a second; three seconds of it are 3 tokens
    with server(["--dimensions", "8", "--tokens-per-minute", "60", "--burst", "3"]) as limited:
        post(limited, input="a" * 8)
        refusal = refused(limited, input="a" * 8)
        assert refusal.code == 429
        assert 0 < int(refusal.headers["retry-after-ms"]) <= 1_000
        assert refusal.headers["x-ratelimit-limit-tokens"] == "60"
        assert stats(limited)["refusals"] == 1


# ---- the clients ----


@pytest.mark.parametrize("client", ["floor", "openai", "openai-raw", "asyncembed"])
def test_a_client_is_measured_in_its_own_process(client: str, job: Job) -> None:
    measured = measure(replace(job, client=client))
    assert isinstance(measured, Measured), measured
    assert (measured.client, measured.count) == (client, 300)
    assert (measured.requests, measured.refusals) == (3, 0)  # 300 texts, 100 a request
    assert measured.seconds > 0
    assert measured.stall_ms is not None
    assert measured.peak_mb is not None
    assert measured.start_mb is not None
    assert measured.peak_mb >= measured.start_mb > 0


def test_a_client_that_fails_reports_its_error(job: Job) -> None:
    error = measure(replace(job, client="openai-raw", expected_dimensions=1_536))  # the server has 256
    assert isinstance(error, str)
    assert "ValueError" in error


def test_an_import_is_measured_alone(job: Job) -> None:
    measured = measure(Job("asyncembed", "", "", 1), imports_only=True)
    assert isinstance(measured, Measured), measured
    assert measured.seconds == measured.import_s > 0


def test_texts_beyond_the_file_are_distinct() -> None:
    texts = Texts(["a", "b"], 5)
    assert list(texts) == ["a", "b", "2 a", "3 b", "4 a"]
    assert texts[1:3] == ["b", "2 a"]


# ---- scenarios and tables ----


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_a_scenario_names_only_existing_clients(scenario: Scenario) -> None:
    assert set(scenario.clients) <= set(CLIENTS)
    assert scenario.ours in scenario.clients


@pytest.mark.parametrize("client", CLIENTS.values(), ids=CLIENTS)
def test_a_client_has_its_code_and_its_requirements(client: object) -> None:
    assert isinstance(client, type(CLIENTS["floor"]))
    if client.opener:
        assert callable(client.load())
    if client.environment:
        assert (environments.REQUIREMENTS / f"{client.environment}.txt").exists()


def one(client: str, count: int, seconds: float, **more: Any) -> Measured:
    return Measured(client, "1.0", count, seconds, cpu_s=0.0, import_s=0.0, **more)


def test_ratios_are_medians_over_rounds_of_the_time_per_text() -> None:
    table = Table(SCENARIOS["bulk"])
    for ours_s, floor_s in ((4.0, 1.0), (3.0, 1.0), (9.0, 9.0)):
        table.add("asyncembed", one("asyncembed", 100, ours_s))
        table.add("floor", one("floor", 50, floor_s))
    assert table.ratio("asyncembed", "floor") == 1.5  # the median of 2, 1.5 and 0.5: half as many texts for the floor
    assert table.seconds_per_text("asyncembed") == 0.04
    row = next(line for line in table.markdown().splitlines() if line.startswith("| **asyncembed** |"))
    assert row.split("|")[2:5] == [" 100 ", " 4.00 ", " 25 "]


def test_a_table_names_the_clients_that_failed() -> None:
    table = Table(SCENARIOS["bulk"])
    table.add("asyncembed", one("asyncembed", 100, 1.0))
    table.add("litellm", "TimeoutError: too slow")
    assert "LiteLLM failed: TimeoutError: too slow" in table.markdown()


def test_the_ideal_time_follows_from_the_rate_limit() -> None:
    table = Table(SCENARIOS["rates"])
    # a million tokens at a third of a million a second, less 1.5 s of burst, and 0.05 s for the last answer: 1.55 s
    table.add("asyncembed", one("asyncembed", 100, 3.1, tokens=1_000_000))
    assert table.over_ideal("asyncembed") == pytest.approx(2.0)


def test_the_picture_has_a_panel_for_each_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables = [Table(SCENARIOS[name]) for name in ("bulk", "long")]
    for table in tables:
        table.add("asyncembed", one("asyncembed", 100, 1.0))
    draw(tables, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1_000


def test_one_call_enters_few_functions_and_modules() -> None:
    # a reader of one call has to follow them all; before the restructuring they were 177 in 20 modules
    done = subprocess.run(
        [sys.executable, "-m", "bench.functions", "--json"], check=True, capture_output=True, cwd=ROOT
    )
    entered = json.loads(done.stdout)
    assert 50 < entered["functions"] <= 130
    assert 10 <= entered["modules"] <= 15
