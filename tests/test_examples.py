"""Every example runs as its first lines say, and shows what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name], capture_output=True, text=True, check=True, timeout=50
    ).stdout


def test_notes_embeds_only_what_changed_and_finds_the_right_one() -> None:
    first, second, best, _ = run("notes.py").splitlines()
    assert "3 stored, 0 skipped" in first
    assert "1 stored, 2 skipped" in second
    assert "bread" in best
