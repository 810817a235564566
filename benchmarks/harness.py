"""What all benchmarks share: processes and clusters of their own, variants, ratios.

Covers: a fresh interpreter for every cluster (:func:`isolated`), so that neither scheduler nor
client nor a thread that the old tool leaves behind meets the next measurement.
Does not cover: the machine's other work. Figures that compare are therefore taken in turns and
paired by round (:func:`rounds`), and come with their range.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import dask
from distributed import Client, LocalCluster
from prometheus_client.parser import text_string_to_metric_families

import dask_memusage_exporter

MIB = 2**20

#: What is measured: no exporter, this one, this one writing a CSV, dask-memusage 1.1.
NONE, OURS, CSV, OLD = "none", "ours", "ours + CSV", "dask-memusage"

#: Seconds after which a measurement counts as hung.
LONGEST = 1800


class Bench(NamedTuple):
    """A cluster that is measured by one variant."""

    cluster: LocalCluster
    client: Client
    #: What the variant writes; empty or missing where it writes nothing.
    csv_path: Path

    @property
    def scheduler(self) -> Any:
        """The cluster's scheduler, which lives in this process."""
        return self.cluster.scheduler

    def rows(self) -> list[dict[str, str]]:
        """Return the rows that are in the CSV now."""
        with open(self.csv_path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def worker_ports(self) -> list[int]:
        """Return the HTTP ports of all workers."""
        return [ws.services["dashboard"] for ws in self.scheduler.workers.values()]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the ``/metrics`` pages of all workers."""
        return sum(on_page(port, name, labels) for port in self.worker_ports())

    def cluster_metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric on the scheduler's page."""
        return on_page(self.scheduler.http_server.port, name, labels)


def on_page(port: int, name: str, labels: Mapping[str, str]) -> float:
    """Return the sum of a metric's samples that have these labels on a ``/metrics`` page."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        families = text_string_to_metric_families(page.read().decode())
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@contextmanager
def bench(
    variant: str, *, workers: int = 1, threads: int = 1, config: Mapping[str, Any] | None = None
) -> Iterator[Bench]:
    """Start a cluster with a variant installed; to be used in :func:`isolated` only.

    Parameters
    ----------
    config
        Dask's configuration for it. The CSV of ours has all columns.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = {"memusage.csv.columns": "full", **(config or {})}
        stack.enter_context(dask.config.set(settings))
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=workers,
                threads_per_worker=threads,
                processes=True,
                dashboard_address="127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0",
            )
        )
        client = stack.enter_context(Client(cluster))
        path = folder / "memusage.csv"
        it = Bench(cluster, client, path)
        install(variant, it.scheduler, path)
        yield it


def install(variant: str, scheduler: Any, path: Path) -> None:
    """Install a variant in a cluster and return when it measures."""
    if variant == OURS:
        dask_memusage_exporter.install(scheduler)
    elif variant == CSV:
        dask_memusage_exporter.install(scheduler, str(path))
    elif variant == OLD:
        import dask_memusage

        dask_memusage.install(scheduler, str(path))
        # It says nowhere that it is ready: its thread connects a client first.
        while len(scheduler.clients) < 2:
            time.sleep(0.01)
        time.sleep(0.5)
    elif variant != NONE:
        raise ValueError(f"{variant!r} is no variant")


def isolated(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call a module's function in a fresh interpreter; arguments and result travel as JSON.

    What it prints to standard error is shown only where it fails: dask-memusage 1.1 prints a
    traceback whenever a cluster closes.
    """
    with tempfile.NamedTemporaryFile("w+", suffix=".json") as file:
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.isolated", file.name],
            input=json.dumps([function.__module__, function.__qualname__, arguments]),
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
        text = file.read()
    if child.returncode or not text:
        raise RuntimeError(f"{function.__module__}.{function.__qualname__}: {child.stderr}")
    return json.loads(text)


def rounds(count: int, variants: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Return ``(round, variant)`` in turns, every other round backwards.

    So that neither a drift of the machine nor who came just before favours anybody.
    """
    for number in range(count):
        for variant in variants if number % 2 == 0 else reversed(variants):
            yield number, variant


class Spread(NamedTuple):
    """A median with its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of some values."""
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int = 2, sign: bool = False) -> str:
        """Return it as text, like ``0.98 (0.95-1.02)``."""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of pairwise ratios of what was measured in the same rounds."""
    return Spread.of([value / other for value, other in zip(values, base, strict=True)])


def differences(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of pairwise differences of what was measured in the same rounds."""
    return Spread.of([value - other for value, other in zip(values, base, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that ``percent`` % of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def share(yes: int, of: int) -> str:
    """Return a share as text, in percent."""
    return f"{100 * yes / of:.1f} %" if of else "-"


def task_bytes(row: dict[str, str]) -> float | None:
    """Return what a row of either CSV says that its task has added; None where it says nothing."""
    if "growth_bytes" in row:
        return float(row["growth_bytes"]) if row["growth_bytes"] else None
    return (float(row["max_memory_mb"]) - float(row["min_memory_mb"])) * MIB
