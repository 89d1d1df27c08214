"""Rounds of all clients in turn, then medians and ratios in a table for each scenario.

python -m bench.run --prepare                 make the peers' environments, once
python -m bench.run --quick                   less of everything, one round
python -m bench.run --only bulk,rates --rounds 5 --json results.json --picture results.png
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from bench import environments
from bench.clients import CLIENTS
from bench.corpus import sections
from bench.job import Job, Measured
from bench.report import Table, draw, machine
from bench.scenarios import SCENARIOS, Scenario

# Longer than the slowest client takes for the most it is given; who hangs is told of and left out.
_TIMEOUT_S = 600.0


@contextmanager
def server(options: Sequence[str] | None) -> Iterator[str]:
    """Start a server and yield its base URL; yield "" if none is needed."""
    if options is None:
        yield ""
        return
    command = [sys.executable, "-m", "bench.server", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=environments.ROOT) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def measure(job: Job) -> Measured | str:
    """Run one client in a process of its own; return what it measured, or the last line of its complaint."""
    command = [environments.python_of(CLIENTS[job.client].environment), "-m", "bench.client", job.to_json()]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=environments.ROOT,
            env=environments.variables(),
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"gave no result in {_TIMEOUT_S:g} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def jobs_of(scenario: Scenario, clients: Sequence[str], base_url: str, texts: Path, *, quick: bool) -> list[Job]:
    jobs = []
    for name in clients:
        most = CLIENTS[name].most_texts
        count = scenario.quick_count if quick else scenario.count
        jobs.append(
            Job(
                name,
                base_url,
                str(texts),
                min(count, most) if most else count,
                scenario.model,
                scenario.dimensions,
                scenario.expected_dimensions,
                scenario.batch_of(name),
            )
        )
    return jobs


def run(scenario: Scenario, clients: Sequence[str], rounds: int, folder: Path, *, quick: bool) -> Table:
    """Measure all clients in turn, round after round, so that whatever else the machine does hits all of them."""
    texts = folder / f"{scenario.characters}.txt"
    if not texts.exists():
        texts.write_text("\n".join(sections(20_000 if scenario.characters < 10_000 else 1_000, scenario.characters)))
    table = Table(scenario)
    with server(scenario.server) as base_url:
        jobs = jobs_of(scenario, clients, base_url, texts, quick=quick)
        for number in range(1 if scenario.slow else rounds):
            for job in jobs:
                measured = measure(job)
                table.add(job.client, measured)
                told = measured if isinstance(measured, str) else f"{measured.seconds:.2f} s"
                print(f"{scenario.title}; round {number + 1}: {job.client}: {told}", file=sys.stderr, flush=True)
    return table


def takes_part(scenario: Scenario, wanted: Sequence[str]) -> list[str]:
    clients = []
    for name in scenario.clients:
        if wanted and name not in wanted:
            continue
        if environments.is_ready(CLIENTS[name].environment):
            clients.append(name)
        else:
            print(f"{name} is not installed: python -m bench.run --prepare", file=sys.stderr)
    return clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the peers' environments in .bench, and end")
    parser.add_argument("--quick", action="store_true", help="less of everything, and one round")
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"scenarios, of {', '.join(SCENARIOS)}")
    parser.add_argument("--clients", default="", help=f"clients, of {', '.join(CLIENTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write every single measurement")
    parser.add_argument("--picture", type=Path, help="where to draw the seconds")
    options = parser.parse_args()
    if options.prepare:
        environments.prepare()
        return
    wanted = [name for name in options.clients.split(",") if name]
    rounds = 1 if options.quick else options.rounds
    print(machine(), flush=True)
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only.split(","):
            scenario = SCENARIOS[name]
            tables.append(run(scenario, takes_part(scenario, wanted), rounds, Path(folder), quick=options.quick))
            print(f"\n{tables[-1].markdown()}", flush=True)
    if options.json:
        found = {table.scenario.title: [asdict(one) for one in table.all()] for table in tables}
        options.json.write_text(json.dumps({"machine": machine(), "measured": found}, indent=1))
    if options.picture:
        draw(tables, options.picture)


if __name__ == "__main__":
    main()
