"""The virtual environments of the clients: the current one, or one made from a file in `bench/peers`."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".bench"
REQUIREMENTS = ROOT / "bench" / "peers"
# The file in which tiktoken looks for cl100k_base: the SHA-1 of the download address (tiktoken/load.py).
_VOCABULARY = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"


def python_of(environment: str) -> Path:
    """Return the Python executable of an environment, which may not exist yet; "" is the current environment."""
    return CACHE / environment / "bin" / "python" if environment else Path(sys.executable)


def is_ready(environment: str) -> bool:
    return not environment or _stamp(environment).exists()


def _stamp(environment: str) -> Path:
    return CACHE / environment / "ready"


def prepare() -> None:
    """Make the missing environments; report those that cannot be made."""
    for requirements in sorted(REQUIREMENTS.glob("*.txt")):
        environment = requirements.stem
        if is_ready(environment):
            continue
        print(f"{environment}: installing", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", CACHE / environment], check=True)
        pip = [python_of(environment), "-m", "pip", "install", "--quiet", "--requirement", requirements]
        if subprocess.run(pip).returncode == 0:
            _stamp(environment).touch()
        else:
            print(f"{environment}: cannot be installed, so it is not measured", file=sys.stderr, flush=True)


@cache
def variables() -> dict[str, str]:
    """Return the environment variables of a measured process."""
    return {
        **os.environ,
        "TIKTOKEN_CACHE_DIR": str(_vocabulary_folder()),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else its import downloads prices
    }


def _vocabulary_folder() -> Path:
    """Return the folder of tiktoken's vocabulary: made from `quicktok` (extra `dev`), else tiktoken downloads it."""
    folder = CACHE / "tiktoken"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _VOCABULARY
    if not path.exists() and find_spec("quicktok"):
        encoding = import_module("quicktok").get_encoding("cl100k_base")
        tokens = (encoding.decode_single_token_bytes(rank) for rank in range(100_256))
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return folder
