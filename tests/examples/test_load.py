"""A short load test of the web app; `python -m tests.examples.load --seconds 60` runs a longer one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.examples.load import DIMENSIONS, ENVIRONMENT, run_load
from tests.examples.server import provider, web_app


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc, which only Linux has")
async def test_under_load_and_faults_every_answer_is_correct_and_sigterm_ends_cleanly(
    store: str, tmp_path: Path
) -> None:
    with provider(DIMENSIONS, latency_s=0.01, fault_rate=0.1) as base_url:
        environment = {**ENVIRONMENT, "OPENAI_BASE_URL": base_url, "DATABASE_URL": store}
        with web_app(tmp_path, watched=True, **environment) as app:
            results = await run_load(
                app, lambda results: results.searches > 300 and results.documents > 3, clients=20, disconnects=0.1
            )
    assert results.wrong == 0
    assert results.disconnected > 0
    assert not results.refused, results.log  # these faults are transient, so no client sees one
    assert results.exit_code == -signal.SIGTERM
    assert "Application shutdown complete" in results.log
    assert "Traceback" not in results.log
