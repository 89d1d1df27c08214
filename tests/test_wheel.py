"""The wheel contains the package and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent


def test_the_wheel_contains_only_the_package_and_its_metadata(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        files = set(archive.namelist())
    metadata = {file for file in files if file.split("/")[0].endswith(".dist-info")}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "asyncembed").rglob("*.py")}
    assert files - metadata == package | {"asyncembed/py.typed"}
    assert {file.partition("/")[2] for file in metadata} >= {"METADATA", "RECORD", "entry_points.txt"}
