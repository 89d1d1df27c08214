"""Under CI a skipped test fails the run, so that no test is lost because a program or a package is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPS = {
    "skip": "def test_it(): pytest.skip('no browser here')",
    "skipif": "@pytest.mark.skipif(True, reason='no browser here')\ndef test_it(): pass",
    "module": "pytest.skip('no browser here', allow_module_level=True)",
}


@pytest.mark.parametrize("kind", SKIPS)
@pytest.mark.parametrize("ci", ["true", ""])
def test_a_skipped_test_fails_under_ci_and_only_there(kind: str, ci: str, tmp_path: Path) -> None:
    (tmp_path / "test_skipped.py").write_text(f"import pytest\n\ndef test_good(): pass\n\n{SKIPS[kind]}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CI": ci}, check=False, capture_output=True, text=True)
    is_failure = done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert is_failure == bool(ci), done.stdout
    assert ("skipped under CI: Skipped: no browser here" in done.stdout) == bool(ci)
