"""Medians, ratios, tables in Markdown, and the picture."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.clients import CLIENTS
from bench.job import Measured
from bench.scenarios import OURS, Scenario


def machine() -> str:
    """Say what was measured on."""
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of each client."""

    title: str
    format: str
    value: Callable[[Table, str], float | None]


@dataclass(slots=True)
class Table:
    """All that was measured in one scenario."""

    scenario: Scenario
    rounds: dict[str, list[Measured]] = field(default_factory=dict)
    complaints: dict[str, str] = field(default_factory=dict)

    def add(self, client: str, measured: Measured | str) -> None:
        if isinstance(measured, str):
            self.complaints[client] = measured
        else:
            self.rounds.setdefault(client, []).append(measured)

    def all(self) -> Iterator[Measured]:
        for rounds in self.rounds.values():
            yield from rounds

    def median(self, client: str, value: Callable[[Measured], float | None]) -> float | None:
        """Return the median over the rounds; None if the client is not there or does not know."""
        values = [found for one in self.rounds.get(client, ()) if (found := value(one)) is not None]
        return statistics.median(values) if values else None

    def ratio(self, client: str, base: str) -> float | None:
        """Return the median, over the rounds, of the time per text over that of another client in the same round."""
        pairs = zip(self.rounds.get(client, ()), self.rounds.get(base, ()), strict=False)
        ratios = [(one.seconds / one.count) / (other.seconds / other.count) for one, other in pairs]
        return statistics.median(ratios) if ratios else None

    def over_ideal(self, client: str) -> float | None:
        ideal_s = self.scenario.ideal_s
        return self.median(client, lambda one: one.seconds / ideal_s(one)) if ideal_s else None

    def markdown(self) -> str:
        columns = [c for c in COLUMNS if any(c.value(self, name) is not None for name in self.rounds)]
        lines = [
            f"### {self.scenario.title}",
            "",
            "| client | " + " | ".join(column.title for column in columns) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        for name in sorted(self.rounds, key=lambda name: self.median(name, seconds_per_text) or 0):
            cells = (column.value(self, name) for column in columns)
            texts = [
                "" if cell is None else format(cell, column.format) for cell, column in zip(cells, columns, strict=True)
            ]
            lines.append(f"| {CLIENTS[name].title} | " + " | ".join(texts) + " |")
        lines += [f"\n{CLIENTS[name].title} failed: {told}" for name, told in self.complaints.items()]
        return "\n".join(lines) + "\n"


def seconds_per_text(one: Measured) -> float:
    return one.seconds / one.count


def _of(name: str) -> Callable[[Table, str], float | None]:
    def value(table: Table, client: str) -> float | None:
        return table.median(client, lambda one: getattr(one, name))

    return value


COLUMNS = (
    Column("texts", ",.0f", _of("count")),
    Column("seconds", ".2f", _of("seconds")),
    Column("texts/s", ",.0f", lambda table, client: table.median(client, lambda one: one.count / one.seconds)),
    Column("CPU s", ".2f", _of("cpu_s")),
    Column("peak MB", ",.0f", _of("peak_mb")),
    Column("grown MB", ",.0f", lambda table, client: table.median(client, lambda one: one.peak_mb - one.start_mb)),
    Column("longest stall ms", ",.0f", _of("stall_ms")),
    Column("requests", ",.0f", _of("requests")),
    Column("refused", ",.0f", _of("refusals")),
    Column("/ ideal", ".2f", Table.over_ideal),
    Column("/ floor", ".1f", lambda table, client: table.ratio(client, "floor")),
    Column("/ ours", ".1f", lambda table, client: table.ratio(client, "asyncembed")),
)


def draw(tables: Sequence[Table], path: Path) -> None:
    """Draw a panel of bars for each table: seconds for 1,000 texts, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [1 + len(table.rounds) for table in tables]
    figure, panels = plt.subplots(
        len(tables), 1, figsize=(9, 0.3 * sum(heights) + 0.5), height_ratios=heights, squeeze=False
    )
    for axes, table in zip(panels[:, 0], tables, strict=True):
        shown = {name: table.median(name, seconds_per_text) or 0.0 for name in table.rounds}
        names = sorted(shown, key=shown.__getitem__)
        seconds = [shown[name] * table.scenario.count for name in names]
        colors = ["#2a6fdb" if name in OURS else "#444a52" if name == "floor" else "#b7bcc4" for name in names]
        bars = axes.barh([CLIENTS[name].title.strip("*") for name in names], seconds, color=colors)
        axes.set_xscale("log")
        axes.set_xlim(min(seconds) / 2, max(seconds) * 3)
        axes.bar_label(bars, [f" {value:,.2f} s" for value in seconds], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_title(table.scenario.title, fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("seconds (log scale)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
