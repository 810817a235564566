"""Several servers in one process share one page: nothing twice, nothing stale, no error spreads."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import prometheus_client
import pytest
from distributed import Client, LocalCluster
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from dask_memusage_exporter import install, process
from dask_memusage_exporter.exporters.prometheus import ProcessCollector
from dask_memusage_exporter.health import Health
from tests.conftest import Metrics, counted, page, scheduler_port, wait_until, worker_ports

TASKS = 20


def run(client: Client, prefix: str, tasks: int = TASKS) -> None:
    """Run tasks of one prefix and wait for their results."""
    client.gather(client.map(abs, range(tasks), key=[f"{prefix}-{i}" for i in range(tasks)]))


def pages(cluster: LocalCluster) -> list[dict[Any, float]]:
    """Return what scheduler, workers and scheduler again show of what tasks have counted."""
    ports = (scheduler_port(cluster), *worker_ports(cluster), scheduler_port(cluster))
    return [
        {
            key: value
            for key, value in Metrics.read(port).items()
            # The scheduler's own are told by batches, between one page and the next.
            if "worker_task_memory" in key[0] and "overhead" not in key[0]
        }
        for port in ports
    ]


def test_all_pages_of_a_process_show_the_same(make_cluster: Any, make_client: Any) -> None:
    """Each series once, on the pages of the scheduler and of both workers, in any order."""
    cluster = make_cluster(processes=False, n_workers=2)
    client = make_client(cluster)
    install(client)
    run(client, "same")
    first, *others = pages(cluster)
    assert all(other == first for other in others)
    for port in worker_ports(cluster):
        assert counted([port], "same") == TASKS
    assert Metrics.read(scheduler_port(cluster)).total("dask_scheduler_task_memory_workers") == len(
        cluster.workers
    )


SCRIPT = """
import json, sys, urllib.request
from distributed import Client, LocalCluster
from dask_memusage_exporter import install

def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return answer.read().decode()

if __name__ == "__main__":
    with LocalCluster(
        processes=False, n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as cluster, Client(cluster) as client:
        ports = [ws.services["dashboard"] for ws in cluster.scheduler.workers.values()]
        ports = [cluster.scheduler.http_server.port, *ports, cluster.scheduler.http_server.port]
        texts = []
        for step in sys.argv[1].split():
            if step == "install":
                install(client)
            else:
                client.gather(client.map(abs, range(10), pure=False))
                texts = [scrape(port) for port in ports]
        print(json.dumps(texts))
"""


@pytest.mark.parametrize(
    "steps", ["install scrape", "scrape install scrape", "scrape install install scrape"]
)
def test_installing_before_and_after_the_first_scrape(steps: str) -> None:
    """Dask registers its collectors at the first scrape, of each server: no clash either way."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, steps],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Duplicated timeseries" not in done.stderr
    for text in json.loads(done.stdout):
        types = [line for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(types) == len(set(types))
        assert 'dask_scheduler_task_memory_workers{source="kernel"}' in text
        assert 'dask_worker_task_memory_peak_bytes_count{task_prefix_name="abs"} 10.0' in text


def test_the_series_of_a_closed_cluster_go(make_cluster: Any, make_client: Any) -> None:
    """One cluster after the other: the second begins at 0 and shows nothing of the first."""
    cluster = make_cluster(processes=False, n_workers=2)
    client = make_client(cluster)
    install(client)
    run(client, "first")
    assert counted([scheduler_port(cluster)], "first") == TASKS
    client.close()
    cluster.close()
    assert "task_memory" not in prometheus_client.generate_latest().decode()
    second = make_cluster(processes=False, n_workers=1)
    client = make_client(second)
    assert "task_memory" not in page(scheduler_port(second))
    install(client)
    run(client, "second")
    assert counted([scheduler_port(second)], "second") == TASKS
    assert counted([scheduler_port(second)], "first") == 0


def test_two_clusters_at_once(make_cluster: Any, make_client: Any) -> None:
    """Both count on the one page, each task once; when one closes the other's stay."""
    clusters = [make_cluster(processes=False, n_workers=n) for n in (1, 2)]
    clients = [make_client(cluster) for cluster in clusters]
    for client in clients:
        install(client)
    for client, prefix in zip(clients, ("left", "right"), strict=True):
        run(client, prefix)
    for cluster in clusters:
        port = scheduler_port(cluster)
        assert counted([port], "left") == counted([port], "right") == TASKS
        wait_until(
            lambda port=port: (
                Metrics.read(port).total("dask_scheduler_task_memory_workers", source="kernel") == 3
            )
        )
    clients[0].close()
    clusters[0].close()
    run(clients[1], "still")
    metrics = Metrics.read(scheduler_port(clusters[1]))
    assert metrics.total("dask_scheduler_task_memory_workers", source="kernel") == 2
    for prefix in ("right", "still"):
        assert counted([scheduler_port(clusters[1])], prefix) == TASKS


def test_other_settings_for_a_process_that_measures_are_said(
    make_cluster: Any, make_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What has been counted cannot change its buckets; a line says what holds."""
    import dask

    cluster = make_cluster(processes=False)
    client = make_client(cluster)
    install(client)
    with dask.config.set({"memusage.max-prefixes": 1}):
        install(client)  # nothing has been measured yet: they take over
        assert not caplog.messages
        run(client, "a")
        run(client, "b")
    port = scheduler_port(cluster)
    assert counted([port], "a") == counted([port], "__overflow__") == TASKS
    caplog.clear()
    install(client)
    (line,) = (message for message in caplog.messages if "other settings than before" in message)
    assert "max_prefixes=1" in line
    run(client, "c")
    assert counted([port], "__overflow__") == 2 * TASKS


# -- errors while a page is rendered ----------------------------------------------------------


@pytest.fixture
def rendered(make_cluster: Any, make_client: Any) -> tuple[LocalCluster, Client]:
    """A measured cluster in this process, one task done."""
    cluster = make_cluster(processes=False)
    client = make_client(cluster)
    install(client)
    run(client, "rendered", 1)
    return cluster, client


def test_an_error_while_rendering_leaves_dasks_series(
    rendered: tuple[LocalCluster, Client],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """200, Dask's own metrics, ours partly, the error counted on that very page, one log line."""
    cluster, _ = rendered
    measuring = process._process
    assert measuring is not None

    def broken() -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(measuring.aggregate, "snapshot", broken)
    for scrape in range(1, 4):
        metrics = Metrics.read(scheduler_port(cluster))
        assert metrics.total("dask_worker_task_memory_errors_total", stage="render") == scrape
        assert metrics.total("dask_scheduler_task_memory_errors_total", stage="render") == 0
        assert metrics.get_value("dask_worker_threads") is not None
        assert metrics.get_value("dask_scheduler_clients") is not None
        assert metrics.get_value("dask_scheduler_task_memory_workers", source="kernel") is not None
        assert metrics.total("dask_worker_task_memory_peak_bytes_count") == 0
    (line,) = (message for message in caplog.messages if "render failed" in message)
    assert "RuntimeError: broken on purpose" in line
    monkeypatch.undo()
    assert counted([scheduler_port(cluster)], "rendered") == 1


class Broken:
    """A renderer of which nothing works."""

    def __init__(self) -> None:
        self.health = Health()

    def collect(self) -> Any:
        raise RuntimeError("broken on purpose")

    collect_health = collect


def test_an_error_while_registering_harms_nothing() -> None:
    """The default registry calls collect of what registers, unless it describes itself."""
    collector, broken = ProcessCollector(), Broken()
    collector.renderers.append(broken)
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector)
    assert broken.health.errors["render"] == 0
    assert prometheus_client.generate_latest(registry) == b""
    assert broken.health.errors["render"] == 2


def test_the_aggregate_may_change_while_the_page_is_rendered(
    rendered: tuple[LocalCluster, Client],
) -> None:
    """Prefixes come and counts rise from other threads: every page is whole and consistent."""
    cluster, _ = rendered
    measuring = process._process
    assert measuring is not None
    from tests.test_aggregate import count as count_one
    from tests.test_aggregate import record

    stop = threading.Event()

    def count() -> None:
        i = 0
        while not stop.is_set():
            count_one(measuring.aggregate, record(f"changing{i % 100}", peak=i, growth=i))
            i += 1

    threads = [threading.Thread(target=count)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            metrics = Metrics.read(scheduler_port(cluster))
            for (name, labels), value in metrics.items():
                if name == "dask_worker_task_memory_peak_bytes_count":
                    tasks = "dask_worker_task_memory_tasks_total"
                    assert metrics.total(tasks, **dict(labels)) == value
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert measuring.health.errors["render"] == 0


FOREIGN = {
    "gauge": GaugeMetricFamily("dask_worker_memory_limit_bytes", "Dask's own.", value=42),
    "counter": CounterMetricFamily("dask_worker_task_memory_overflow_tasks", "Dask's own.", 42),
    "histogram": HistogramMetricFamily(
        "dask_worker_task_memory_peak_bytes", "Dask's own.", [("+Inf", 42)], 42
    ),
}


class Foreign(Collector):
    """What a later version of Dask may show under one of our names."""

    def __init__(self, family: Any) -> None:
        self.family = family

    def collect(self) -> Any:
        yield self.family


@contextmanager
def registered(collector: Collector) -> Iterator[None]:
    """Have a collector in the registry that Dask's pages show."""
    prometheus_client.REGISTRY.register(collector)
    try:
        yield
    finally:
        prometheus_client.REGISTRY.unregister(collector)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_name_that_dask_shows_itself_is_dasks(
    kind: str, rendered: tuple[LocalCluster, Client]
) -> None:
    """Ours steps aside, for a name twice makes the whole page invalid; all else of ours stays."""
    cluster, _ = rendered
    family = FOREIGN[kind]
    before = page(scheduler_port(cluster))
    with registered(Foreign(family)):
        text = page(scheduler_port(cluster))
        suffix = "_total" if kind == "counter" else ""
        assert text.count(f"# TYPE {family.name}{suffix} ") == 1
        assert "Dask's own." in text
        assert Metrics.read(scheduler_port(cluster)).total(family.samples[0].name) == 42
        assert text.count("# TYPE dask_worker_task_memory") >= 9
    after = page(scheduler_port(cluster))
    assert after.count("# TYPE") == before.count("# TYPE")
    assert "Dask's own." not in after


def test_what_runs_on_other_event_loops_does_not_disturb(
    make_cluster: Any, make_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One cluster's page is read while workers of another come and go on that one's loop."""
    steady = make_cluster(processes=False)
    install(make_client(steady))
    changing = make_cluster(processes=False, n_workers=0)
    install(make_client(changing))
    stop = threading.Event()
    errors: list[Exception] = []

    def read() -> None:
        try:
            while not stop.is_set():
                page(scheduler_port(steady))
        except Exception as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for workers in (4, 0, 4, 0):
            changing.scale(workers)
            wait_until(lambda workers=workers: len(changing.scheduler.workers) == workers)
    finally:
        stop.set()
        reader.join()
    assert errors == []
    for cluster in (steady, changing):
        assert cluster.scheduler.extensions["memusage"].health.errors["render"] == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
