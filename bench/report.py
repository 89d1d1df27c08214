"""Medians, ratios, tables in Markdown, and the chart."""

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
    """Describe this machine in one line."""
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    write: Callable[[float], str]
    value: Callable[[Table, str], float | None]


@dataclass(slots=True)
class Table:
    """All measurements of one scenario."""

    scenario: Scenario
    rounds: dict[str, list[Measured]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, client: str, measured: Measured | str) -> None:
        if isinstance(measured, str):
            self.errors[client] = measured
        else:
            self.rounds.setdefault(client, []).append(measured)

    def all(self) -> Iterator[Measured]:
        for rounds in self.rounds.values():
            yield from rounds

    def median(self, client: str, value: Callable[[Measured], float | None]) -> float | None:
        """Return the median over the rounds; None if there is no value."""
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

    def seconds_per_text(self, client: str) -> float:
        return self.median(client, lambda one: one.seconds / one.count) or 0.0

    def texts(self, client: str) -> float | None:
        return None if self.scenario.imports_only else self.median(client, lambda one: one.count)

    def texts_per_s(self, client: str) -> float | None:
        return None if self.scenario.imports_only else 1 / self.seconds_per_text(client)

    def title_of(self, client: str) -> str:
        """Return the client's title, for peers with the version: `Name 1.2, how it is used`."""
        name, comma, how = CLIENTS[client].title.partition(",")
        version = self.rounds[client][0].version
        return name + (f" {version}" if CLIENTS[client].is_peer else "") + comma + how

    def markdown(self) -> str:
        columns = [c for c in COLUMNS if any(c.value(self, name) is not None for name in self.rounds)]
        lines = [
            f"### {self.scenario.title}",
            "",
            "| client | " + " | ".join(column.title for column in columns) + " |",
            "|---|" + "---:|" * len(columns),
        ]
        for name in sorted(self.rounds, key=self.seconds_per_text):
            values = (column.value(self, name) for column in columns)
            cells = ["" if v is None else c.write(v) for v, c in zip(values, columns, strict=True)]
            lines.append(f"| {self.title_of(name)} | {' | '.join(cells)} |")
        lines += [f"\n{CLIENTS[name].title} failed: {error}" for name, error in self.errors.items()]
        return "\n".join(lines) + "\n"


def _of(name: str) -> Callable[[Table, str], float | None]:
    def value(table: Table, client: str) -> float | None:
        return table.median(client, lambda one: getattr(one, name))

    return value


def _grown_mb(one: Measured) -> float | None:
    return None if one.start_mb is None or one.peak_mb is None else one.peak_mb - one.start_mb


def whole(value: float) -> str:
    return f"{value:,.0f}"


def three_digits(value: float) -> str:
    return whole(value) if value >= 100 else f"{value:#.3g}" if value >= 1e-3 else f"{value:.4f}"


COLUMNS = (
    Column("texts", whole, Table.texts),
    Column("seconds", three_digits, _of("seconds")),
    Column("texts/s", whole, Table.texts_per_s),
    Column("CPU s", three_digits, _of("cpu_s")),
    Column("peak MB", whole, _of("peak_mb")),
    Column("grown MB", whole, lambda table, client: table.median(client, _grown_mb)),
    Column("longest stall ms", whole, _of("stall_ms")),
    Column("requests", whole, _of("requests")),
    Column("refused", whole, _of("refusals")),
    Column("/ ideal", three_digits, Table.over_ideal),
    Column("/ floor", three_digits, lambda table, client: table.ratio(client, table.scenario.floor)),
    Column("/ ours", three_digits, lambda table, client: table.ratio(client, table.scenario.ours)),
)


def draw(tables: Sequence[Table], path: Path) -> None:
    """Draw a panel of bars for each table: seconds for all texts, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    heights = [1 + len(table.rounds) for table in tables]
    figure, panels = plt.subplots(
        len(tables), 1, figsize=(9, 0.3 * sum(heights) + 0.5), height_ratios=heights, squeeze=False
    )
    for axes, table in zip(panels[:, 0], tables, strict=True):
        names = sorted(table.rounds, key=table.seconds_per_text)
        seconds = [table.seconds_per_text(name) * table.scenario.count for name in names]
        colors = ["#2a6fdb" if name in OURS else "#444a52" if name == "floor" else "#b7bcc4" for name in names]
        bars = axes.barh([table.title_of(name).replace("**", "") for name in names], seconds, color=colors)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # the bars are labelled
        axes.set_xlim(min(seconds) / 2, max(seconds) * 3)
        axes.bar_label(bars, [f" {value:,.2f} s" for value in seconds], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_title(table.scenario.title, fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("seconds (log scale), extrapolated for clients that were given fewer texts", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
