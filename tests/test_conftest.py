"""Under CI a skipped test fails the run, so that no test is lost because a program or a package is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPS = {
    "call": "def test_it(): pytest.skip('in the test')",
    "mark": "@pytest.mark.skipif(True, reason='by a mark')\ndef test_it(): pass",
    "module": "pytest.skip('in the module', allow_module_level=True)",
}


@pytest.mark.parametrize("ci", ["true", ""], ids=["under CI", "elsewhere"])
def test_a_skipped_test_fails_under_ci_and_only_there(ci: str, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_good.py").write_text("def test_it(): pass\n")
    for name, code in SKIPS.items():
        (tmp_path / f"test_{name}.py").write_text(f"import pytest\n\n{code}\n")
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--import-mode=importlib", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--continue-on-collection-errors", *options],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == bool(ci), done.stdout
    for reason in ("in the test", "by a mark", "in the module"):
        assert (f"skipped under CI: Skipped: {reason}" in done.stdout) == bool(ci), done.stdout
    assert "1 passed" in done.stdout
