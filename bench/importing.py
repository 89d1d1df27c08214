"""How long an import takes, in a process that has imported nothing yet.

python -m bench.importing asyncembed asyncembed asyncembed      (client, modules, distribution)
"""

from __future__ import annotations

import sys
import time


def main() -> None:
    client, modules, distribution = sys.argv[1:]
    cpu_began, began = time.process_time(), time.perf_counter()
    for module in modules.split(","):
        __import__(module)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_began

    from importlib.metadata import version

    from bench.job import Measured

    print(Measured(client, version(distribution), 1, seconds, cpu_s, seconds).to_json())


if __name__ == "__main__":
    main()
