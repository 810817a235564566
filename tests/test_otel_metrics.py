"""Metrics over OpenTelemetry's protocol, from real workers to a real receiver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import dask
import pytest
from distributed import Client

from dask_memusage_exporter import MemusageWorkerPlugin, catalog, install
from dask_memusage_exporter.config import DEFAULT_BUCKETS
from dask_memusage_exporter.health import DROP_REASONS, STAGES, Health
from tests import tasks, tasks_children
from tests.conftest import (
    Measured,
    Metrics,
    local_cluster,
    measured,
    scheduler_port,
    wait_until,
)
from tests.deaths import grow, kill_when_running
from tests.receivers import Received, receiver, variables

NAMES = {spec.otel.name: spec for spec in catalog.METRICS if spec.otel is not None}

PEAK, GROWTH = "dask.worker.task.memory.peak", "dask.worker.task.memory.growth"
TASKS = "dask.worker.task.memory.tasks"


@contextmanager
def sending(
    protocol: str = "http/protobuf", config: dict[str, Any] | None = None, **options: Any
) -> Iterator[tuple[Measured, Received]]:
    """Hold a measured cluster that sends to a receiver; ``env`` changes its variables."""
    env = options.pop("env", {})
    with receiver(protocol) as received, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            patch.delenv(name)
        given = variables(received.endpoint, OTEL_EXPORTER_OTLP_PROTOCOL=protocol, **env)
        for name, value in given.items():
            patch.setenv(name, value)
        with measured(config, **options) as cluster:
            yield cluster, received


@pytest.fixture(scope="module")
def sent() -> Iterator[tuple[Measured, Received]]:
    """A cluster of two workers whose resource attributes a user has set, all alike."""
    env = {
        "OTEL_SERVICE_NAME": "etl",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,service.instance.id=mine",
    }
    with sending(config={"distributed.worker.daemon": False}, n_workers=2, env=env) as both:
        yield both


def run(cluster: Measured, prefix: str, sizes: list[int]) -> None:
    keys = [f"{prefix}-{i}" for i in range(len(sizes))]
    cluster.client.gather(cluster.client.map(tasks.array, sizes, key=keys))


@pytest.mark.ends
def test_counts_and_sums_are_the_records(sent: tuple[Measured, Received]) -> None:
    """Short tasks, whose records are made many at a time, and large ones alike."""
    cluster, received = sent
    run(cluster, "large", [50] * 6)
    run(cluster, "short", [0] * 300)
    for prefix, count in (("large", 6), ("short", 300)):
        for name in (PEAK, TASKS):
            wait_until(lambda p=prefix, n=count, m=name: received.total(m, p) == n, what=prefix)
        records = cluster.records.of(prefix)
        assert len(records) == count
        peaks = received.latest(PEAK, **{"dask.task.prefix.name": prefix})
        assert sum(one.data.sum for one in peaks) == sum(r.peak_bytes for r in records)
        assert list(peaks[0].data.explicit_bounds) == list(DEFAULT_BUCKETS)
        for scope in ("process", "shared", "thread"):
            of_scope = [record for record in records if record.scope == scope]
            attributes = {"dask.task.memory.scope": scope}
            assert received.total(TASKS, prefix, **attributes) == len(of_scope)
        grown = [r.growth_bytes for r in records if r.growth_bytes is not None]
        assert received.total(GROWTH, prefix) == len(grown)
        growths = received.latest(GROWTH, **{"dask.task.prefix.name": prefix})
        assert sum(one.data.sum for one in growths) == sum(grown)


def test_names_units_and_attributes_are_the_catalogs(sent: tuple[Measured, Received]) -> None:
    """Neither more nor less, from workers and scheduler each what it knows itself."""
    cluster, received = sent
    runs = 0
    while not [one for one in cluster.records if one.growth_bytes is not None]:
        runs += 1  # a growth is not always known
        assert runs < 20
        cluster.client.submit(tasks.array, 200, key=f"named-{runs}").result()
    kills = {name for name in NAMES if "killed_last" in name}  # no worker has died here
    wait_until(lambda: {point.name for point in received.points()} == NAMES.keys() - kills)
    for point in received.latest():
        spec = NAMES[point.name]
        assert spec.otel is not None
        assert point.unit == spec.otel.unit
        assert set(point.attributes) == {catalog.ATTRIBUTES[label] for label in spec.labels}
        kind = "sum" if spec.kind == "counter" else spec.kind
        assert point.kind == kind, point.name
        servers = {"dask.worker.address": "worker", "dask.scheduler.id": "scheduler"}
        (server,) = (who for name, who in servers.items() if name in point.resource)
        assert server in spec.otel.on


def test_counters_stand_at_0_first(sent: tuple[Measured, Received]) -> None:
    """A series that first appears at 1 has no increase."""
    _, received = sent
    wait_until(lambda: received.points("dask.memusage.errors"))
    points = received.points("dask.memusage.errors")
    assert {point.attributes["dask.memusage.stage"] for point in points} == set(STAGES)
    points = received.points("dask.memusage.dropped_records")
    assert {point.attributes["dask.memusage.drop.reason"] for point in points} == set(DROP_REASONS)
    assert {point.value for point in received.latest("dask.memusage.errors")} == {0}


def test_kills_come_from_the_scheduler() -> None:
    """Which kind of task was killed, of what and how high; all causes are at 0 before."""
    killed, peak = (f"dask.scheduler.task.memory.killed_{one}" for one in ("tasks", "last_peak"))
    with sending(config={"distributed.scheduler.allowed-failures": 0}) as (cluster, received):

        def by_cause() -> dict[str, float]:
            points = received.latest(killed, **{"dask.task.prefix.name": "doomed"})
            return {point.attributes["dask.task.kill.cause"]: point.value for point in points}

        cluster.client.submit(tasks.array, 1, key="doomed-1").result()
        wait_until(lambda: by_cause() == {"memory": 0, "signal": 0, "lost": 0})
        wait_until(lambda: received.total(TASKS, "doomed") == 1)  # the worker's own has come
        assert not received.points(peak)
        future = cluster.client.submit(grow, 50, 0.05, 400, key="doomed-2")
        kill_when_running(cluster, "doomed", 350)
        wait_until(lambda: by_cause() == {"memory": 0, "signal": 1, "lost": 0})
        assert future.exception() is not None
        (last,) = received.latest(peak)
        (record,) = [one for one in cluster.records.of("doomed") if one.status == "killed"]
        assert last.attributes == {"dask.task.prefix.name": "doomed"}
        assert last.value == record.peak_bytes
        # What has died is no task that was measured to its end.
        assert received.total(TASKS, "doomed") == 1


def test_each_process_is_an_instance_of_its_own(sent: tuple[Measured, Received]) -> None:
    """Whatever the user has set for all; what else he has set stands, and restarts are new ones."""
    cluster, received = sent
    workers = set(cluster.cluster.scheduler.workers)

    def resources() -> list[dict[str, Any]]:
        return [point.resource for point in received.latest("dask.memusage.time")]

    wait_until(lambda: workers <= {one.get("dask.worker.address") for one in resources()})
    for one in resources():
        assert one["service.name"] == "etl"
        assert one["deployment.environment.name"] == "test"
        assert one["service.instance.id"].startswith("mine-")
    instances = {one["service.instance.id"] for one in resources()}
    assert len(instances) == len(workers) + 1  # and the scheduler


def test_sums_over_instances_are_the_clusters() -> None:
    """Before and after workers are restarted: what they have told stays, and nothing falls."""
    name = "dask_scheduler_task_memory_tasks_total"
    with sending(n_workers=2) as (cluster, received):
        port = scheduler_port(cluster.cluster)
        for runs in (1, 2):
            keys = [f"summed-{runs}-{i}" for i in range(20)]
            cluster.client.gather(cluster.client.map(tasks.array, [1] * 20, key=keys))
            wait_until(lambda n=runs: received.total(PEAK, "summed") == 20 * n)
            wait_until(lambda n=runs: received.total(TASKS, "summed") == 20 * n)
            assert Metrics.read(port).total(name, task_prefix_name="summed") == 20 * runs
            if runs == 1:
                cluster.client.restart(timeout=100)
    series: dict[Any, float] = {}
    for point in received.points(TASKS, **{"dask.task.prefix.name": "summed"}):
        assert point.value >= series.get(point.series, 0)
        series[point.series] = point.value
    assert len({point.resource["service.instance.id"] for point in received.latest(TASKS)}) > 2


@pytest.mark.parametrize("end", ["retired", "lifetime"])
def test_a_worker_sends_its_last_figures(end: str) -> None:
    """Retired, or at the end of its lifetime: its tasks are in, however far the next export is."""
    with sending(env={"OTEL_METRIC_EXPORT_INTERVAL": "3600000"}) as (late, last):
        run(late, "last", [0] * 50)
        assert not last.points()
        wait_until(lambda: not late.cluster.scheduler.tasks, what="results to be let go")
        if end == "retired":
            late.client.retire_workers(list(late.cluster.scheduler.workers))
        else:
            late.client.run(end_lifetime)
        wait_until(lambda: last.total(PEAK, "last") == last.total(TASKS, "last") == 50)


def end_lifetime(dask_worker: Any) -> None:
    """Do what the timer of ``--lifetime`` does."""
    dask_worker.loop.add_callback(dask_worker.close_gracefully)


@pytest.mark.ends
def test_prefixes_beyond_the_cap_overflow() -> None:
    """Before the SDK's own limit does; delta and exponential histograms are the user's choice."""
    env = {
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
        "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": (
            "base2_exponential_bucket_histogram"
        ),
    }
    config = {"memusage.max-prefixes": 1, "memusage.prefixes.deny": ["denied*"]}
    with sending("grpc", config, env=env) as (cluster, received):
        for prefix in ("denied", "first", "second"):
            run(cluster, prefix, [0] * 5)

        def count(prefix: str) -> float:
            points = received.points(PEAK, **{"dask.task.prefix.name": prefix})
            return sum(point.value for point in points)

        wait_until(lambda: (count("first"), count("__overflow__")) == (5, 10))
        point = received.points(PEAK)[0]
        assert point.kind == "exponential_histogram"
        prefixes = {p.attributes["dask.task.prefix.name"] for p in received.points(PEAK)}
        assert prefixes == {"first", "__overflow__"}


def test_forked_children_send_nothing(sent: tuple[Measured, Received]) -> None:
    """A child that lives for several intervals; the parent's totals are right."""
    cluster, received = sent
    before = {point.resource["service.instance.id"] for point in received.points()}
    cluster.client.submit(tasks_children.fork_holds, 1, 1.5, key="forks-1").result()
    wait_until(lambda: received.total(PEAK, "forks") == 1)
    requests = len(received.requests)
    wait_until(lambda: len(received.requests) > requests + 3)
    assert before == {point.resource["service.instance.id"] for point in received.points()}
    # A child that sent as its parent would send its copy at its own times, some of them the same.
    times = [
        (point.series, point.data.time_unix_nano) for point in received.points("dask.memusage.time")
    ]
    assert len(times) == len(set(times))
    for one in received.points(PEAK, **{"dask.task.prefix.name": "forks"}):
        assert one.value == 1


def test_a_receiver_that_comes_back_has_everything(sent: tuple[Measured, Received]) -> None:
    """What it refused meanwhile is in the next export, and the errors are counted."""
    cluster, received = sent
    received.status = 400
    run(cluster, "refused", [0] * 20)
    arrived = received.arrived
    wait_until(lambda: received.arrived > arrived + 3)
    received.status = 200
    wait_until(lambda: received.total(PEAK, "refused") == 20)
    stage = {"dask.memusage.stage": "export"}
    wait_until(lambda: received.total("dask.memusage.errors", **stage) >= 1)


def test_other_settings_before_the_first_task_are_no_other_instance() -> None:
    """A worker that is set up by its own plugin, and anew by the scheduler's settings."""
    with ExitStack() as stack:
        received = stack.enter_context(receiver())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in variables(received.endpoint, OTEL_TRACES_EXPORTER="none").items():
            patch.setenv(name, value)
        cluster = stack.enter_context(local_cluster())
        client = stack.enter_context(Client(cluster))
        client.register_plugin(MemusageWorkerPlugin())
        limit = "dask.worker.memory.limit"
        wait_until(lambda: received.points(limit))
        with dask.config.set({"memusage.max-prefixes": 7}):
            install(cluster.scheduler)
        client.submit(tasks.array, 1, key="anew-1").result()
        wait_until(lambda: received.total(PEAK, "anew") == 1)
        assert len({point.resource["service.instance.id"] for point in received.points(limit)}) == 1


def test_what_workers_have_told_is_not_the_schedulers_own() -> None:
    """Each process sends its own, or sums over instances would count errors twice."""
    health = Health("scheduler")
    health.error("render", ValueError("on purpose"))
    health.add({"errors": {"render": 2, "stop": 1}, "dropped": {"invalid": 3}})
    assert (health.errors["render"], health.own("errors")["render"]) == (3, 1)
    assert (health.own("errors")["stop"], health.own("dropped")["invalid"]) == (0, 0)
