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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

# Before Dask reads its environment, here and in every process that is started: workers' own pages
# are a test's witness of what each has counted. Where the default is tested it is set there.
os.environ["DASK_MEMUSAGE__WORKER_METRICS"] = "full"

import dask
import psutil
import pytest
from distributed import Client, LocalCluster
from prometheus_client.parser import text_string_to_metric_families

import dask_memusage_exporter
from dask_memusage_exporter import nanny
from dask_memusage_exporter.records import TaskMemory
from tests.tasks import Gate

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


def counted(ports: Iterable[int], prefix: str) -> float:
    """Return how many executions of a prefix worker pages show; counter and histograms agree."""
    pages = [Metrics.read(port) for port in ports]

    def total(name: str, **labels: str) -> float:
        name = f"dask_worker_task_memory_{name}"
        return sum(one.total(name, task_prefix_name=prefix, **labels) for one in pages)

    tasks = total("tasks_total")
    assert total("peak_bytes_count") == total("peak_bytes_bucket", le="+Inf") == tasks
    assert total("growth_bytes_count") == tasks - total("tasks_total", scope="shared")
    return tasks


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


def local_cluster(**options: Any) -> LocalCluster:
    """Return a LocalCluster of one worker process with one thread; ``options`` change that."""
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
    return LocalCluster(**options)


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., LocalCluster]]:
    """Return what makes LocalClusters that are closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(local_cluster(**options))
    gc.collect()


@pytest.fixture
def make_client() -> Iterator[Callable[..., Client]]:
    """Return what connects clients that are closed at the end of the test, before the clusters."""
    with ExitStack() as stack:
        yield lambda cluster, **options: stack.enter_context(Client(cluster, **options))


@contextmanager
def measured(config: dict[str, Any] | None = None, **options: Any) -> Iterator[Measured]:
    """Hold a measured LocalCluster; ``config`` is dask configuration for it."""
    with ExitStack() as stack:
        with dask.config.set(config or {}):
            cluster = stack.enter_context(local_cluster(**options))
            client = stack.enter_context(Client(cluster))
            records = Records()
            dask_memusage_exporter.install(cluster.scheduler)
            cluster.scheduler.extensions["memusage"].add_sink(records)
            # Again: the workers hear that somebody listens now.
            dask_memusage_exporter.install(cluster.scheduler)
        yield Measured(cluster, client, records)
    gc.collect()


@pytest.fixture
def measure() -> Iterator[Callable[..., Measured]]:
    """Return what makes measured clusters, see :func:`measured`, closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(measured(*args, **options))


@pytest.fixture
def dying(measure: Callable[..., Measured], tmp_path: Path) -> Callable[..., Measured]:
    """Return what makes a measured cluster whose workers may die: one death fails a task."""

    def make(**options: Any) -> Measured:
        config = {
            **FULL,
            "memusage.csv.path": str(tmp_path / "memusage.csv"),
            "distributed.scheduler.allowed-failures": 0,
            **options.pop("config", {}),
        }
        return measure(config, **options)

    return make


@pytest.fixture
def go(tmp_path: Path) -> Iterator[Gate]:
    """Return a gate for tasks to wait at; it opens at the end of the test at the latest."""
    gate = Gate(tmp_path / "go")
    yield gate
    gate.open()


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[Gate]:
    """Return another gate."""
    gate = Gate(tmp_path / "stop")
    yield gate
    gate.open()


@pytest.fixture
def childless() -> None:
    """End the processes that multiprocessing keeps as children of this one, and starts anew."""
    resource_tracker._resource_tracker._stop()
    forkserver._forkserver._stop()
    assert not psutil.Process().children()


@pytest.fixture(scope="session")
def jemalloc() -> str:
    """Return where libjemalloc is, or skip loudly; under CI=true it fails."""
    try:
        return nanny.find()
    except nanny.JemallocError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(f"{error}; run tests/install-components as root")


@pytest.fixture(scope="session")
def component() -> Callable[..., str]:
    """Return what finds a real program, or skips loudly; under CI=true it fails.

    Its second argument is where to look, if not on ``PATH``.
    """

    def find(name: str, path: str | None = None) -> str:
        found = shutil.which(name, path=path)
        if found is None:
            reason = f"{name} is not installed: run tests/install-components as root"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        return found

    return find


@pytest.fixture(scope="session")
def helm(component: Callable[[str], str]) -> Any:
    """Return the newer Helm, see ``tests.charts``."""
    from tests.charts import Helm

    return Helm(component("helm4"))


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
