"""A real Prometheus scrapes what we show and answers the queries that people ask of it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import KilledWorker
from prometheus_client import CollectorRegistry, start_http_server

from benchmarks.quantiles import histogram_quantile
from dask_memusage_exporter.aggregate import Aggregate, Batch
from dask_memusage_exporter.config import DEFAULT_BUCKETS, MIB
from dask_memusage_exporter.exporters.prometheus import worker_families
from dask_memusage_exporter.records import TaskMemory
from tests.conftest import Measured, scheduler_port, wait_until, worker_ports
from tests.servers import Prometheus


@pytest.fixture
def prometheus(component: Callable[[str], str], tmp_path: Path) -> Callable[..., Prometheus]:
    """Return what starts a Prometheus on ports."""
    return lambda ports: Prometheus(component("prometheus"), tmp_path / "prometheus", ports)


def test_it_scrapes_and_answers(
    measure: Callable[..., Measured], prometheus: Callable[..., Prometheus]
) -> None:
    """Worker and scheduler of a running cluster, and Dask's own series beside ours."""
    measured = measure()
    client = measured.client
    client.gather(client.map(abs, range(10), key=[f"scraped-{i}" for i in range(10)]))
    ports = [*worker_ports(measured.cluster), scheduler_port(measured.cluster)]
    with prometheus(ports) as server:
        tasks = 'sum(dask_worker_task_memory_tasks_total{task_prefix_name="scraped"})'
        wait_until(lambda: server.query(tasks) == [10])
        observed = 'dask_worker_task_memory_peak_bytes_count{task_prefix_name="scraped"}'
        assert server.query(observed) == [10]
        (quantile,) = server.query(
            "histogram_quantile(0.5, sum by (le) (dask_worker_task_memory_peak_bytes_bucket))"
        )
        assert 2**20 < quantile < 2**32
        kernel = 'dask_scheduler_task_memory_workers{source="kernel"}'
        wait_until(lambda: server.query(kernel) == [1])
        wait_until(lambda: server.query("up") == [1, 1])
        # Ours join with Dask's own series by the prefix.
        joined = (
            "sum by (task_prefix_name) (dask_worker_task_memory_tasks_total) "
            "and on (task_prefix_name) dask_scheduler_prefix_state_totals_total"
            '{task_prefix_name="scraped"}'
        )
        assert server.query(joined) == [10]


def stay() -> None:
    time.sleep(600)


def test_a_first_kill_is_an_increase(
    measure: Callable[..., Measured], prometheus: Callable[..., Prometheus]
) -> None:
    """Of a prefix that was scraped before: an alert on ``increase`` sees the very first one."""
    measured = measure({"distributed.scheduler.allowed-failures": 0})
    with prometheus([scheduler_port(measured.cluster)]) as server:
        future = measured.client.submit(stay, key="job-0")
        kills = 'dask_scheduler_task_memory_killed_tasks_total{task_prefix_name="job"}'
        wait_until(lambda: server.query(kills) == [0, 0, 0], what="a scrape before the kill")
        (nanny,) = measured.cluster.workers.values()
        os.kill(nanny.pid, signal.SIGKILL)
        assert isinstance(future.exception(), KilledWorker)
        wait_until(lambda: server.query(f"sum(increase({kills}[1m])) > 0"), what="an increase")
        assert server.query(f'{kills[:-1]},cause="signal"}}') == [1]
        (age,) = server.query(
            "time() - dask_scheduler_task_memory_killed_last_timestamp_seconds"
            '{task_prefix_name="job"}'
        )
        assert 0 <= age < 60


class Shown:
    """Families of an aggregate, for a registry."""

    def __init__(self, aggregate: Aggregate) -> None:
        self._aggregate = aggregate

    def collect(self) -> Iterator[Any]:
        yield from worker_families(
            namespace="dask", mode="full", aggregate=self._aggregate, memory_limit=None
        )


def test_quantiles_are_prometheus_own(prometheus: Callable[..., Prometheus]) -> None:
    """The copy of ``histogram_quantile`` by which benchmarks judge the buckets says the same."""
    chance = random.Random(1)
    batch = Batch(DEFAULT_BUCKETS)
    aggregate = Aggregate(bounds=DEFAULT_BUCKETS, max_prefixes=9, maximum_window=600)
    draws: dict[str, Callable[[], float]] = {
        "loguniform": lambda: 2 ** chance.uniform(20, 38),
        "narrow": lambda: 100 * MIB * chance.gauss(1, 0.02),
        "small": lambda: 1.0,
        "huge": lambda: 2.0**40,
    }
    for prefix, draw in draws.items():
        for _ in range(1000):
            batch.observe(
                TaskMemory(
                    "key", prefix, "worker", 0.0, 1.0, 0, int(draw()), None, "shared", "overlap",
                    None, 0, 2, 0, 0, "finished", None,
                )
            )  # fmt: skip
    aggregate.add(batch.take())
    registry = CollectorRegistry()
    registry.register(Shown(aggregate))
    shown, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        with prometheus([shown.server_port]) as server:
            name = "dask_worker_task_memory_peak_bytes_bucket"
            wait_until(lambda: server.query(f"count({name})"))
            for one in aggregate.snapshot():
                for quantile in (0.01, 0.5, 0.95, 0.99):
                    (theirs,) = server.query(
                        f'histogram_quantile({quantile}, {name}{{task_prefix_name="{one.label}"}})'
                    )
                    ours = histogram_quantile(quantile, DEFAULT_BUCKETS, one.peak.cumulative)
                    assert ours == pytest.approx(theirs, rel=1e-9), (one.label, quantile)
    finally:
        shown.shutdown()
        shown.server_close()
        thread.join()
