"""Whose OpenTelemetry providers are used, what identifies them, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from dask_memusage_exporter import install, providers
from dask_memusage_exporter.aggregate import OVERFLOW
from dask_memusage_exporter.exporters import otlp
from dask_memusage_exporter.health import Health
from tests import applications, tasks
from tests.conftest import local_cluster, measured, wait_until
from tests.receivers import Received, receiver, variables

PEAK, TASKS = "dask.worker.task.memory.peak", "dask.worker.task.memory.tasks"
PREFIX = "dask.task.prefix.name"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of OpenTelemetry's but what a test sets."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def set_variables(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what sets variables for a test."""

    def set_them(given: dict[str, str]) -> None:
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return set_them


# -- nothing where nobody asks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "env", [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_METRICS_EXPORTER": "none"}]
)
def test_nothing_is_imported_where_nobody_asks(env: dict[str, str], set_variables: Any) -> None:
    """A real worker that measures, and a fresh interpreter with a scheduler of ours."""
    if env:
        env = variables("http://127.0.0.1:1", OTEL_TRACES_EXPORTER="none", **env)
    set_variables(env)
    with measured() as cluster:
        cluster.client.submit(tasks.array, 1, key="plain-1").result()
        assert list(cluster.client.run(applications.opentelemetry_modules).values()) == [[]]
    program = """
import asyncio, json, sys
from distributed import Scheduler
import dask_memusage_exporter

async def run():
    async with Scheduler(dashboard_address=":0", port=0) as scheduler:
        await dask_memusage_exporter.dask_setup(scheduler)

asyncio.run(run())
print(json.dumps([name for name in sys.modules if name.startswith("opentelemetry")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("env", "traces", "metrics"),
    [
        ({}, [], []),
        ({"OTEL_SERVICE_NAME": "etl"}, [], []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, ["otlp"], ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, ["otlp"], []),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c"}, [], ["otlp"]),
        ({"OTEL_METRICS_EXPORTER": "console, otlp"}, [], ["console", "otlp"]),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"},
            [],
            ["otlp"],
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "True"}, [], []),
    ],
)
def test_only_variables_that_name_a_receiver_ask(
    env: dict[str, str], traces: list[str], metrics: list[str], set_variables: Any
) -> None:
    """No exporter of the SDK's defaults: a plain worker talks to nobody."""
    set_variables(env)
    assert (providers.wanted("traces"), providers.wanted("metrics")) == (traces, metrics)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "'http/json' is not one of grpc, http"),
        ({"OTEL_METRICS_EXPORTER": "nothing"}, "there is no exporter 'nothing'; install what"),
        ({"OTEL_METRIC_EXPORT_INTERVAL": "-1"}, "correct the OTEL_. variables"),
    ],
)
def test_wrong_variables_are_one_clear_error(
    env: dict[str, str], message: str, set_variables: Any
) -> None:
    """It says what is wrong and how to mend it."""
    set_variables(variables("http://127.0.0.1:1", **env))
    with pytest.raises(providers.ProviderError, match=message):
        providers.build("metrics", Health(), {})


def test_wrong_variables_stop_no_task(set_variables: Any) -> None:
    """The worker measures, says it once, and counts it."""
    set_variables(variables("http://127.0.0.1:1", OTEL_EXPORTER_OTLP_PROTOCOL="carrier-pigeon"))
    with measured() as cluster:
        cluster.client.submit(tasks.array, 1, key="wrong-1").result()
        assert len(cluster.records.of("wrong")) == 1
        (log,) = cluster.client.get_worker_logs().values()
        said = [line for _, line in log if "carrier-pigeon" in line]
        assert len(said) == 1, log


def test_spans_that_are_wanted_and_cannot_be_are_said() -> None:
    """Where they are switched on and nobody takes them; and nothing is imported for it."""
    with measured({"memusage.spans.enabled": True}) as cluster:
        cluster.client.submit(tasks.array, 1, key="wanted-1").result()
        (log,) = cluster.client.get_worker_logs().values()
        assert len([line for _, line in log if "there is nothing to send spans to" in line]) == 1
        assert list(cluster.client.run(applications.opentelemetry_modules).values()) == [[]]


# -- identity --------------------------------------------------------------------------------------


def test_a_pod_is_known_from_inside(tmp_path: Path) -> None:
    """Its name and namespace, and nothing outside Kubernetes."""
    namespace = tmp_path / "namespace"
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "worker-7"}
    assert providers.kubernetes(environ, namespace) == {"k8s.pod.name": "worker-7"}
    namespace.write_text("etl\n")
    assert providers.kubernetes(environ, namespace)["k8s.namespace.name"] == "etl"
    assert providers.kubernetes({"HOSTNAME": "laptop"}, namespace) == {}


def test_the_resource_without_variables() -> None:
    """A service a kind of server, an instance of its own each time."""
    one, other = (providers.resource(providers.identity("worker", name="a")) for _ in range(2))
    assert one.attributes["service.name"] == "dask-worker"
    assert one.attributes["dask.worker.name"] == "a"
    assert one.attributes["service.instance.id"] != other.attributes["service.instance.id"]


# -- an application's own --------------------------------------------------------------------------


@pytest.fixture
def both() -> Iterator[Received]:
    """A receiver of an application's and of ours."""
    with receiver() as received:
        yield received


def by_service(received: Received, prefix: str) -> dict[str, float]:
    """Return how many tasks of a prefix each service has sent."""
    counts: dict[str, float] = {}
    for point in received.latest(PEAK, **{"dask.task.prefix.name": prefix}):
        service = point.resource["service.name"]
        counts[service] = counts.get(service, 0) + point.value
    return counts


@pytest.mark.ends
def test_an_applications_provider_is_used(
    both: Received, set_variables: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Set before us or after us, without a warning; it stands when we go."""
    set_variables(variables(both.endpoint, OTEL_TRACES_EXPORTER="none"))
    with local_cluster(n_workers=2) as cluster, Client(cluster) as client:
        first, second = cluster.scheduler.workers
        client.run(applications.set_own_providers, both.endpoint, workers=[first])
        install(cluster.scheduler)

        def run(prefix: str, worker: str) -> None:
            keys = [f"{prefix}-{i}" for i in range(5)]
            client.gather(client.map(tasks.array, [1] * 5, key=keys, workers=[worker]))

        run("before", first)
        run("ours", second)
        wait_until(lambda: by_service(both, "before") == {"application": 5})
        wait_until(lambda: by_service(both, "ours") == {"dask-worker": 5})
        client.run(applications.set_own_providers, both.endpoint, workers=[second])

        def followed() -> bool:
            run("after", second)
            return "application" in by_service(both, "after")

        wait_until(followed)  # within a heartbeat; what was before is not lost
        run("then", second)
        wait_until(lambda: by_service(both, "then") == {"application": 5})
        client.unregister_worker_plugin("memusage")
        assert all(client.run(applications.add_own).values())
        wait_until(lambda: both.total("own") == 2)
    said = capfd.readouterr()
    assert "verriding" not in said.out + said.err
    assert "shutdown can only be called once" not in said.out + said.err


@pytest.mark.parametrize(
    ("text", "size"), [("", 2048), ("many", 2048), ("0", 2048), ("-1", 2048), ("7", 7)]
)
def test_the_queues_size(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number is none, as the SDK has it, and never a queue without a bound."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", text)
    assert providers.queue_size() == size


def test_an_idle_scheduler_follows_an_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """That sets its provider while there are neither workers nor tasks."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    own = MeterProvider([reader], shutdown_on_exit=False)
    with measured(n_workers=0):
        assert reader.get_metrics_data() is None
        monkeypatch.setattr(
            providers, "application", lambda signal: own if signal == "metrics" else None
        )
        wait_until(reader.get_metrics_data)
    own.shutdown()


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], dict[str, float]]]:
    """What an application's own MeterProvider has of a metric, summed by an attribute."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    own = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(
        providers, "application", lambda signal: own if signal == "metrics" else None
    )

    def values(name: str, attribute: str) -> dict[str, float]:
        data = reader.get_metrics_data()
        metrics = [] if data is None else data.resource_metrics[0].scope_metrics[0].metrics
        found: dict[str, float] = {}
        for metric in metrics:
            for point in metric.data.data_points if metric.name == name else ():
                one = point.attributes[attribute]
                found[one] = found.get(one, 0) + point.value
        return found

    yield values
    own.shutdown()


def test_an_applications_instruments_outlive_us(
    values: Callable[[str, str], dict[str, float]],
) -> None:
    """Clusters come and go in one process: what has gone is observed no longer, and counts stay."""

    def workers() -> float | None:
        return values("dask.scheduler.task.memory.workers", "dask.memusage.source").get("kernel")

    spent = [0.0]
    for _ in range(2):
        with measured(n_workers=1) as cluster:
            cluster.client.submit(tasks.array, 1, key="guest-1").result()
            wait_until(lambda: workers() == 1)
        wait_until(lambda: workers() is None)
        spent.append(values("dask.memusage.time", "dask.memusage.stage")["record"])
    assert 0 < spent[1] < spent[2]


def test_any_number_of_clusters_in_one_process(
    values: Callable[[str, str], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Series of those that have gone are bounded; beyond that they count in the overflow."""
    monkeypatch.setattr(otlp, "_MOST", 1)
    counted = {}
    for prefix in ("first", "second", "third"):
        with measured(n_workers=1, processes=False) as cluster:
            for i in range(3):
                cluster.client.submit(tasks.nothing, key=f"{prefix}-{i}").result()
            wait_until(lambda: values(TASKS, PREFIX).get(prefix) == 3)  # noqa: B023
        counted = values(TASKS, PREFIX)
        assert "third" not in counted
    assert sum(counted.values()) == 9
    assert counted[OVERFLOW] >= 6
