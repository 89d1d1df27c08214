"""A short busy day; `python -m tests.examples.load --seconds 60` has a longer one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.examples.load import DIMENSIONS, ENVIRONMENT, live
from tests.examples.server import provider, web_app


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory of a process as Linux shows it")
async def test_on_a_busy_bad_day_every_answer_is_right_and_sigterm_ends_it_well(store: str, tmp_path: Path) -> None:
    with provider(DIMENSIONS, latency_s=0.01, fault_rate=0.1) as base_url:
        environment = {**ENVIRONMENT, "OPENAI_BASE_URL": base_url, "DATABASE_URL": store}
        with web_app(tmp_path, watched=True, **environment) as app:
            day = await live(app, lambda day: day.searches > 300 and day.documents > 3, clients=20, hang_ups=0.1)
    assert day.wrong == 0
    assert day.hung_up > 0
    assert not day.refused, day.log  # these faults pass by themselves, so no client sees one
    assert day.exit_code == -signal.SIGTERM
    assert "Application shutdown complete" in day.log
    assert "Traceback" not in day.log
