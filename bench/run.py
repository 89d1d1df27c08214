"""Measures all clients in turn, round after round, and prints a table of medians and ratios for each scenario.

    python -m bench.run --prepare                 make the peers' environments, once
    python -m bench.run --quick                   less of everything, one round
    python -m bench.run --only bulk,rates --rounds 5 --json results.json --picture results.png

The tables are printed to the standard output, the progress to the standard error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import environments
from bench.clients import CLIENTS
from bench.corpus import sections
from bench.job import Job, Measured
from bench.report import Table, draw, machine
from bench.scenarios import SCENARIOS, Scenario

# Longer than the slowest client needs for its largest job; a client that hangs is reported and left out.
_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Places:
    """The addresses for a scenario's processes: server, file of texts, PostgreSQL; "" for those that are not needed."""

    base_url: str
    texts: Path
    dsn: str


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


def measure(job: Job, *, imports_only: bool = False) -> Measured | str:
    """Run one client in a separate process; return its result, or the last line of its error."""
    client = CLIENTS[job.client]
    arguments = (
        ["bench.importing", job.client, client.imports, client.distribution]
        if imports_only
        else ["bench.client", job.to_json()]
    )
    try:
        done = subprocess.run(
            [environments.python_of(client.environment), "-m", *arguments],
            capture_output=True,
            text=True,
            cwd=environments.ROOT,
            env=environments.variables(),
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no result within {_TIMEOUT_S:g} s"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return lines[-1].strip(" |") if lines else f"exit {done.returncode}"
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def job_of(scenario: Scenario, client: str, places: Places, *, quick: bool) -> Job:
    return Job(
        client,
        places.base_url,
        str(places.texts),
        scenario.count_of(client, quick=quick),
        scenario.model,
        scenario.dimensions,
        scenario.expected_dimensions,
        scenario.batch_of(client),
        target=places.dsn,
        floats=scenario.floats,
    )


@contextmanager
def places_of(scenario: Scenario, folder: Path) -> Iterator[Places]:
    """Start the servers of the scenario and write its texts."""
    texts = folder / f"{scenario.characters}.txt"
    if not texts.exists():
        texts.write_text("\n".join(sections(scenario.lines, scenario.characters)))
    with ExitStack() as stack:
        dsn = stack.enter_context(_postgres()) if scenario.needs_postgres else ""
        yield Places(stack.enter_context(server(scenario.server)), texts, dsn)


@contextmanager
def _postgres() -> Iterator[str]:
    from bench.sinks import postgres  # which imports drivers that only some scenarios need

    with postgres() as dsn:
        yield dsn


def run(scenario: Scenario, clients: Sequence[str], rounds: int, folder: Path, *, quick: bool) -> Table:
    """Measure all clients in turn, round after round, so that other load on the machine affects all of them."""
    table = Table(scenario)
    with places_of(scenario, folder) as places:
        for number in range(1 if scenario.is_slow else rounds):
            for client in clients:
                if client in table.errors:  # a client that failed is left out, so that rounds stay comparable
                    continue
                job = job_of(scenario, client, places, quick=quick)
                measured = measure(job, imports_only=scenario.imports_only)
                table.add(client, measured)
                outcome = measured if isinstance(measured, str) else f"{measured.seconds:.2f} s"
                print(f"{scenario.title}; round {number + 1}: {client}: {outcome}", file=sys.stderr, flush=True)
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
    parser.add_argument("--prepare", action="store_true", help="make the peers' environments in .bench, then exit")
    parser.add_argument("--quick", action="store_true", help="less of everything, and one round")
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"scenarios, of {', '.join(SCENARIOS)}")
    parser.add_argument("--clients", default="", help=f"clients, of {', '.join(CLIENTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="the file for all measurements")
    parser.add_argument("--picture", type=Path, help="the file for the chart")
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
