"""`python -m asyncembed.testing` as a process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    options = ["--dimensions", "8", "--latency", "0.001", "--dialect", "tei"]
    command = [sys.executable, "-W", "error", "-m", "asyncembed.testing", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        yield started
        started.kill()


def embed(url: str, texts: list[str]) -> list[list[float]]:
    body = json.dumps({"model": "m", "input": texts}).encode()
    with urllib.request.urlopen(urllib.request.Request(url + "/embeddings", body, method="POST")) as reply:
        return [item["embedding"] for item in json.load(reply)["data"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_prints_its_address_serves_and_exits_cleanly_on_a_signal(
    process: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/v1")
    assert [len(vector) for vector in embed(url, ["a", "b"])] == [8, 8]
    with pytest.raises(urllib.error.HTTPError, match="413") as caught:
        embed(url, ["a"] * 33)
    caught.value.close()
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (0, "", "")


def test_an_unknown_option_is_refused() -> None:
    command = [sys.executable, "-m", "asyncembed.testing", "--dialect", "klingon"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'klingon'" in done.stderr
