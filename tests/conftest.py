"""Fixtures: real clusters with real worker processes, and their real pages.

Tests wait on conditions (:func:`wait_until`) and never on time that passes.
"""

from __future__ import annotations

import csv
import gc
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster
from prometheus_client.parser import text_string_to_metric_families

import dask_memusage_exporter
from dask_memusage_exporter.records import TaskMemory

#: What records look like where a test asks for all of them.
FULL = {"memusage.csv.columns": "full"}


def wait_until(condition: Callable[[], Any], timeout: float = 30.0, what: str = "") -> Any:
    """Return the first true value of a condition; fail after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"waited {timeout} s for {what or condition}; last value {value!r}")
        time.sleep(0.02)


def page(port: int, path: str = "/metrics") -> str:
    """Return what a Dask server's HTTP port shows."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        assert answer.status == 200
        return answer.read().decode()


class Metrics(dict[tuple[str, tuple[tuple[str, str], ...]], float]):
    """Samples of a page, by name and labels."""

    @classmethod
    def read(cls, port: int) -> Metrics:
        """Read and parse the page of a server."""
        samples = cls()
        for family in text_string_to_metric_families(page(port)):
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                assert key not in samples, f"{key} stands twice on the page"
                samples[key] = sample.value
        return samples

    def get_value(self, name: str, **labels: str) -> float | None:
        """Return the value of one sample; None where it is not on the page."""
        return self.get((name, tuple(sorted(labels.items()))))

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of all samples of a name that have these labels."""
        return sum(
            value
            for (other, has), value in self.items()
            if other == name and labels.items() <= dict(has).items()
        )


def scheduler_port(cluster: LocalCluster) -> int:
    """Return the HTTP port of a cluster's scheduler."""
    return cluster.scheduler.http_server.port


def worker_ports(cluster: LocalCluster) -> list[int]:
    """Return the HTTP ports of the workers that are connected now."""
    return [ws.services["dashboard"] for ws in cluster.scheduler.workers.values()]


def cluster_total(cluster: LocalCluster, name: str, **labels: str) -> float:
    """Return the sum of a worker metric over the pages of all workers (processes of their own)."""
    return sum(Metrics.read(port).total(name, **labels) for port in worker_ports(cluster))


def rows(path: Path | str) -> list[dict[str, str]]:
    """Return the rows of a CSV."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


class Records(list[TaskMemory]):
    """A record sink at the scheduler: all records of a cluster in this process."""

    def write(self, record: TaskMemory) -> None:
        self.append(record)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def of(self, prefix: str) -> list[TaskMemory]:
        """Return the records of one prefix, in order of arrival."""
        return [record for record in self if record.task_prefix == prefix]


class Measured:
    """A LocalCluster that is measured, its client, and all its records."""

    def __init__(self, cluster: LocalCluster, client: Client, records: Records) -> None:
        self.cluster = cluster
        self.client = client
        self.records = records


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., LocalCluster]]:
    """Return what makes LocalClusters that are closed at the end of the test."""
    with ExitStack() as stack:

        def make(**options: Any) -> LocalCluster:
            options = {
                "n_workers": 1,
                "threads_per_worker": 1,
                "processes": True,
                "dashboard_address": "127.0.0.1:0",
                "memory_limit": "4GiB",
                **options,
            }
            if options["processes"]:
                options.setdefault("worker_dashboard_address", "127.0.0.1:0")
            return stack.enter_context(LocalCluster(**options))

        yield make
    gc.collect()


@pytest.fixture
def make_client() -> Iterator[Callable[..., Client]]:
    """Return what connects clients that are closed at the end of the test, before the clusters."""
    with ExitStack() as stack:
        yield lambda cluster, **options: stack.enter_context(Client(cluster, **options))


@pytest.fixture
def measure(
    make_cluster: Callable[..., LocalCluster], make_client: Callable[..., Client]
) -> Callable[..., Measured]:
    """Return what makes a measured cluster; ``config`` is dask configuration for it."""

    def make(config: dict[str, Any] | None = None, **options: Any) -> Measured:
        with dask.config.set(config or {}):
            cluster = make_cluster(**options)
            client = make_client(cluster)
            records = Records()
            dask_memusage_exporter.install(cluster.scheduler)
            agent = cluster.scheduler.extensions["memusage"]
            agent.add_sink(records)
            # Again: the workers hear that somebody listens now.
            dask_memusage_exporter.install(cluster.scheduler)
        return Measured(cluster, client, records)

    return make


@pytest.fixture
def component(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Return what finds a real program, or skips loudly; under CI=true it fails."""

    def find(name: str) -> str:
        found = shutil.which(name)
        if found is None:
            reason = f"{name} is not installed: run tests/install-components as root"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        return found

    return find


def run_cli(*arguments: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess:
    """Run ``dask ARGUMENTS`` as a process and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "dask", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
