"""1,000 tasks on four workers: a real store of metrics, and every span with its parent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client

from dask_memusage_exporter import install
from tests import tasks
from tests.conftest import FULL, local_cluster, rows, wait_until
from tests.receivers import Received, receiver
from tests.servers import VictoriaMetrics

TASKS = 1_000
KEYS = [f"stored-{i}" for i in range(TASKS)]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def store(component: Callable[[str], str], tmp_path: Path) -> Iterator[VictoriaMetrics]:
    """A store that runs."""
    store = VictoriaMetrics(component("victoria-metrics"), tmp_path / "store")
    yield store
    store.stop()


@contextmanager
def a_thousand_tasks(path: Path, parent: AbstractContextManager[Any]) -> Iterator[dict[str, Any]]:
    """Run them on four workers, submitted under a parent; yield the CSV's rows by task."""
    with dask.config.set(FULL), local_cluster(n_workers=4) as cluster, Client(cluster) as client:
        install(cluster.scheduler, path)
        with parent:
            futures = client.map(tasks.array, [i % 3 for i in range(TASKS)], key=KEYS)
        client.gather(futures)
        yield {row["task_key"]: row for row in rows(path)}


def check_spans(received: Received, of_task: dict[str, Any]) -> None:
    """Hold every span against its task's row."""
    spans = wait_until(lambda: len(found := received.spans("stored")) == TASKS and found)
    assert {span.attributes["dask.task.key"] for span in spans} == set(KEYS)
    for span in spans:
        row = of_task[span.attributes["dask.task.key"]]
        assert (span.data.trace_id.hex(), span.data.parent_span_id.hex()) == (TRACE, PARENT)
        assert span.attributes["dask.task.memory.peak"] == int(row["peak_bytes"])
        assert span.attributes["dask.task.memory.scope"] == row["scope"]
        assert str(span.attributes.get("dask.task.memory.growth", "")) == row["growth_bytes"]
        assert span.resource["dask.worker.address"] == row["worker"]


def peaks(of_task: dict[str, Any]) -> list[int]:
    return [int(row["peak_bytes"]) for row in of_task.values()]


@pytest.mark.component("victoria-metrics")
def test_metrics_over_http_and_spans_over_grpc(
    store: VictoriaMetrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real store's count and sum equal the CSV's; spans are all there, in one trace."""
    with receiver("grpc") as traces:
        for name, value in {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": store.endpoint,
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": traces.endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }.items():
            monkeypatch.setenv(name, value)
        with a_thousand_tasks(
            tmp_path / "memusage.csv", dask.annotate(traceparent=f"00-{TRACE}-{PARENT}-01")
        ) as of_task:
            name = 'dask_worker_task_memory_peak_bytes_{}{{dask_task_prefix_name="stored"}}'
            count, total = (f"sum({name.format(part)})" for part in ("count", "sum"))
            wait_until(lambda: store.query(count) == [TASKS], what=count)
            assert store.query(total) == [sum(peaks(of_task))]
            # Restarted workers are other instances: what has been stays.
            assert len(store.query(name.format("count"))) == 4
            check_spans(traces, of_task)


def test_metrics_over_grpc_and_spans_over_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: the store of metrics takes HTTP only, so these are receivers of ours."""
    with receiver("grpc") as metrics, receiver() as traces:
        for name, value in {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": metrics.endpoint,
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
            "OTEL_METRIC_EXPORT_INTERVAL": "500",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{traces.endpoint}/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
        }.items():
            monkeypatch.setenv(name, value)
        with a_thousand_tasks(
            tmp_path / "memusage.csv", dask.annotate(traceparent=f"00-{TRACE}-{PARENT}-01")
        ) as of_task:
            peak, growth = (f"dask.worker.task.memory.{name}" for name in ("peak", "growth"))
            wait_until(lambda: metrics.total(peak, "stored") == TASKS)
            stored = {"dask.task.prefix.name": "stored"}
            assert sum(one.data.sum for one in metrics.latest(peak, **stored)) == sum(
                peaks(of_task)
            )
            grown = [int(g) for row in of_task.values() if (g := row["growth_bytes"])]
            assert metrics.total(growth, "stored") == len(grown)
            assert sum(one.data.sum for one in metrics.latest(growth, **stored)) == sum(grown)
            assert len({one.resource["service.instance.id"] for one in metrics.latest(peak)}) == 4
            check_spans(traces, of_task)
            # A process is one instance, whatever it sends.
            assert {one.resource["service.instance.id"] for one in traces.spans("stored")} == {
                one.resource["service.instance.id"] for one in metrics.latest(peak)
            }
