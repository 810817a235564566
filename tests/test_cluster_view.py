"""The scheduler's page carries the whole cluster, whoever comes and goes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_memusage_exporter import install
from tests.conftest import Measured, Metrics, page, scheduler_port, wait_until, worker_ports
from tests.servers import Servers, free_port

PREFIX = "dask_scheduler_task_memory_"


def inc(number: int) -> int:
    return number + 1


def take(mib: int) -> int:
    return int(np.ones(mib * 2**17).sum())


def cluster_counts(cluster: LocalCluster, prefix: str) -> float:
    """Return how many executions the scheduler shows; its counter and histograms agree."""
    metrics = Metrics.read(scheduler_port(cluster))

    def total(name: str, **labels: str) -> float:
        return metrics.total(PREFIX + name, task_prefix_name=prefix, **labels)

    tasks = total("tasks_total")
    assert total("peak_bytes_count") == total("peak_bytes_bucket", le="+Inf") == tasks
    assert total("input_bytes_count") == tasks
    assert total("growth_bytes_count") == total("tasks_total", scope="process")
    return tasks


def test_every_task_is_in_once(measure: Callable[..., Measured]) -> None:
    """Sums over the cluster equal the records, for histograms, sums and counters."""
    measured = measure(n_workers=2)
    client = measured.client
    client.gather(client.map(take, [1, 5, 20] * 10, pure=False, key="take"))
    wait_until(lambda: cluster_counts(measured.cluster, "take") == 30)
    metrics = Metrics.read(scheduler_port(measured.cluster))
    records = measured.records.of("take")
    for name in ("peak", "growth"):
        sizes = [size for one in records if (size := getattr(one, f"{name}_bytes")) is not None]
        assert metrics.total(f"{PREFIX}{name}_bytes_sum") == sum(sizes)
        largest = metrics.get_value(f"{PREFIX}{name}_maximum_bytes", task_prefix_name="take")
        assert largest == max(sizes, default=None)


def test_workers_page_has_totals_where_the_scheduler_shows_all(
    measure: Callable[..., Measured],
) -> None:
    """`auto` spares Prometheus the prefixes of every worker."""
    measured = measure({"memusage.worker-metrics": "auto"})
    client = measured.client
    client.gather(client.map(inc, range(10), pure=False, key="inc"))
    (port,) = worker_ports(measured.cluster)
    metrics = Metrics.read(port)
    assert metrics.total("dask_worker_task_memory_tasks_total") == 10
    assert metrics.total("dask_worker_task_memory_tasks_total", task_prefix_name="inc") == 0
    assert "task_prefix_name" not in page(port)


def test_counts_stay_when_workers_go(measure: Callable[..., Measured]) -> None:
    """Kill -9, retirement and restart take nothing back, and leave no series of their own."""
    measured = measure(n_workers=3)
    client, cluster = measured.client, measured.cluster

    def count(expected: int) -> None:
        wait_until(lambda: cluster_counts(cluster, "inc") == expected)

    client.gather(client.map(inc, range(60), pure=False, key="inc"))
    count(60)
    os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
    wait_until(lambda: len(cluster.scheduler.workers) == 3, timeout=60)
    count(60)
    client.retire_workers([next(iter(cluster.scheduler.workers))])
    count(60)
    client.restart()
    client.gather(client.map(inc, range(40), pure=False, key="inc"))
    count(100)
    text = page(scheduler_port(cluster))
    assert "tcp://" not in "".join(line for line in text.splitlines() if "task_memory" in line)


def test_short_tasks_without_rows(make_cluster: Callable[..., LocalCluster]) -> None:
    """Their records are made many at a time: none is missing, also when the worker goes at once."""
    cluster = make_cluster(n_workers=2)
    install(cluster)
    with Client(cluster) as client:
        client.gather(client.map(inc, range(1050), pure=False, key="inc"))
        client.gather(client.map(take, [100] * 4, pure=False, key="inc-large"))
        client.retire_workers(list(cluster.scheduler.workers)[:1])
        wait_until(lambda: cluster_counts(cluster, "inc") == 1050)
    metrics = Metrics.read(scheduler_port(cluster))
    # Where a growth is claimed of an empty task it is none, whatever the large ones took.
    assert metrics.total(f"{PREFIX}growth_bytes_sum", task_prefix_name="inc") < 2**20
    assert metrics.total(f"{PREFIX}peak_bytes_sum", task_prefix_name="inc") > 1050 * 2**20
    for error in ("errors_total", "dropped_records_total"):
        assert metrics.total(PREFIX + error) == 0


def test_the_cap_holds_across_the_cluster(measure: Callable[..., Measured]) -> None:
    """The scheduler decides which prefixes have a label; the rest are counted under one."""
    measured = measure({"memusage.max-prefixes": 3}, n_workers=2)
    client = measured.client
    futures = [client.submit(inc, n, key=f"kind{n % 8}-{n}") for n in range(80)]
    client.gather(futures)
    name = f"{PREFIX}tasks_total"

    def settled() -> bool:
        return Metrics.read(scheduler_port(measured.cluster)).total(name) == 80

    wait_until(settled)
    metrics = Metrics.read(scheduler_port(measured.cluster))
    labels = {dict(has)["task_prefix_name"] for (other, has) in metrics if other == name}
    assert len(labels - {"__overflow__"}) == 3
    assert metrics.get_value(f"{PREFIX}prefixes") == 3
    overflow = metrics.total(name, task_prefix_name="__overflow__")
    assert overflow == metrics.get_value(f"{PREFIX}overflow_tasks_total") == 50


def test_patterns_choose_who_has_a_label(measure: Callable[..., Measured]) -> None:
    """Allowed and not denied; the others still count, under __overflow__."""
    measured = measure({"memusage.prefixes.allow": ["kee*"], "memusage.prefixes.deny": ["keep2"]})
    client = measured.client
    client.gather([client.submit(inc, 1, key=f"{name}-0") for name in ("keep1", "keep2", "other")])
    name = f"{PREFIX}tasks_total"

    def by_label() -> dict[str, float]:
        metrics = Metrics.read(scheduler_port(measured.cluster))
        labels = ("keep1", "keep2", "other", "__overflow__")
        return {label: metrics.total(name, task_prefix_name=label) for label in labels}

    wait_until(lambda: by_label() == {"keep1": 1, "keep2": 0, "other": 0, "__overflow__": 2})


def test_health_of_the_workers_reaches_the_scheduler(measure: Callable[..., Measured]) -> None:
    """Time spent on the workers, their limit, and when one was last heard of are on one page."""
    measured = measure(memory_limit="2GiB")
    client = measured.client
    client.gather(client.map(inc, range(10), pure=False, key="inc"))
    wait_until(lambda: cluster_counts(measured.cluster, "inc") == 10)
    metrics = Metrics.read(scheduler_port(measured.cluster))
    assert metrics.get_value(f"{PREFIX}workers", source="kernel") == 1
    assert metrics.get_value(f"{PREFIX}workers", source="missing") == 0
    assert (metrics.get_value(f"{PREFIX}overhead_seconds_total", stage="start") or 0) > 0
    assert metrics.get_value(f"{PREFIX}worker_limit_bytes") == 2 * 2**30
    assert metrics.total(f"{PREFIX}last_report_timestamp_seconds") > 1e9


def test_a_worker_that_has_just_joined_is_not_missing(measure: Callable[..., Measured]) -> None:
    """It says hello before its first heartbeat, so scaling up does not look like a fault."""
    measured = measure(n_workers=0)
    measured.cluster.scale(1)
    wait_until(lambda: measured.cluster.scheduler.workers)
    measured.client.submit(inc, 1).result()
    metrics = Metrics.read(scheduler_port(measured.cluster))
    assert metrics.get_value(f"{PREFIX}workers", source="missing") == 0


def test_two_clusters_one_after_the_other(
    make_cluster: Callable[..., LocalCluster], measure: Callable[..., Measured]
) -> None:
    """In one process: the second begins at 0, and nothing of the first is shown."""
    first = measure(processes=False, n_workers=2)
    first.client.gather(first.client.map(inc, range(10), pure=False, key="old"))
    wait_until(lambda: cluster_counts(first.cluster, "old") == 10)
    first.client.close()
    first.cluster.close()
    second = measure(processes=False, n_workers=2)
    second.client.gather(second.client.map(inc, range(5), pure=False, key="new"))
    wait_until(lambda: cluster_counts(second.cluster, "new") == 5)
    assert "old" not in page(scheduler_port(second.cluster))


@pytest.mark.parametrize("path", ["/memusage", "/memusage/live"])
def test_live_pages_show_what_runs(measure: Callable[..., Measured], path: str) -> None:
    """The page and its JSON name the running task, escaped, with how high its process is."""
    measured = measure()
    future = measured.client.submit(lambda: __import__("time").sleep(5), key="<b>-0")

    def shown() -> bool:
        return "-0" in page(scheduler_port(measured.cluster), path)

    wait_until(shown)
    text = page(scheduler_port(measured.cluster), path)
    if path == "/memusage":
        assert "&lt;b&gt;-0" in text
        assert "<b>" not in text
    else:
        (worker,) = json.loads(text)["workers"]
        (task,) = worker["running"]
        assert (task["key"], worker["source"]) == ("<b>-0", "kernel")
        assert task["peak_bytes"] >= task["start_bytes"] > 0
    future.result()


def test_fifty_workers_come_and_go(measure: Callable[..., Measured]) -> None:
    """Workers that join and leave with work under way lose and double no task and leave nothing."""
    measured = measure(n_workers=1, processes=False)
    client, cluster = measured.client, measured.cluster
    agent = cluster.scheduler.extensions["memusage"]
    futures, seen = [], set()
    for size in (20, 1, 20, 1, 14, 1):
        cluster.scale(size)
        wait_until(lambda size=size: len(cluster.scheduler.workers) == size, timeout=60)
        seen |= set(cluster.scheduler.workers)
        futures += client.map(inc, range(50), pure=False, key="churn")
    assert len(seen) >= 50
    client.gather(futures)
    wait_until(lambda: cluster_counts(cluster, "churn") == len(measured.records.of("churn")))
    assert len(measured.records.of("churn")) >= 300
    # Nothing is kept of those who have gone, on the page or behind it.
    text = page(scheduler_port(cluster))
    assert not [address for address in seen if address in text]
    wait_until(lambda: len(agent.deaths._homes) == 1)
    assert set(agent.batches._received) <= {
        home.incarnation for home in agent.deaths._homes.values()
    }
    assert not agent.deaths.unsettled


def test_a_scheduler_that_restarts(tmp_path: Path) -> None:
    """It begins at 0 and counts what is run since; tasks of before are nobody's kill."""
    port = free_port()
    servers, again = (Servers(tmp_path / name) for name in ("first", "second"))
    try:
        for one in (servers, again):
            one.directory.mkdir()
            one.scheduler("--port", str(port), "--preload", "dask_memusage_exporter")
            worker = one.worker("--no-nanny")
            one.client.gather(one.client.map(abs, range(7), key="lived", pure=False))
            if one is servers:
                running = one.client.submit(sleep, 5, key="cut-0")
                wait_until(lambda: "cut-0" in page(servers.scheduler_port, "/memusage/live"))
                one.kill_scheduler()
                # A worker closes with its scheduler, unlike one that is killed.
                worker.process.wait(60)
                del running
        name = f"{PREFIX}tasks_total"
        wait_until(
            lambda: Metrics.read(again.scheduler_port).total(name, task_prefix_name="lived") == 7
        )
        metrics = Metrics.read(again.scheduler_port)
        assert metrics.total(f"{PREFIX}killed_tasks_total") == 0
        assert metrics.total(f"{PREFIX}dropped_records_total") == 0
    finally:
        again.close()
        servers.close()


def test_who_listens_changes_nothing(
    measure: Callable[..., Measured], make_client: Callable[..., Client]
) -> None:
    """Three clients, two of them on our topic: each record is counted once, and none is flooded."""
    measured = measure()
    heard: list[Any] = []
    others = [make_client(measured.cluster) for _ in range(2)]
    for client in (measured.client, others[0]):
        client.subscribe_topic("memusage", heard.append)
    for client in (measured.client, *others):
        client.gather(client.map(inc, range(1000), pure=False, key="many"))
    wait_until(lambda: cluster_counts(measured.cluster, "many") == 3000)
    assert len(measured.records.of("many")) == 3000
    # The topic tells of kills; nothing is sent or kept for a task that simply ran.
    assert heard == []
    assert measured.client.get_events("memusage") == ()


def test_a_row_that_cannot_be_sent_is_counted(
    measure: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask drops in silence what a worker sends by a broken connection; its count comes at last."""
    measured = measure(processes=False)
    port = scheduler_port(measured.cluster)

    def lost(server: str) -> float:
        name = f"dask_{server}_task_memory_dropped_records_total"
        return Metrics.read(port).total(name, reason="disconnected")

    (worker,) = measured.cluster.workers.values()
    monkeypatch.setattr(worker.batched_stream.comm, "closed", lambda: True)
    future = measured.client.submit(inc, 1, key="unsent-1")
    wait_until(lambda: lost("worker") == 1)
    future.cancel()
    measured.client.retire_workers([worker.address])
    wait_until(lambda: lost("scheduler") == 1)
    assert cluster_counts(measured.cluster, "unsent") == 1
    assert measured.records.of("unsent") == []
