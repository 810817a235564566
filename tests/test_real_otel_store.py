"""1,000 tasks on four workers: a real store of metrics, and every span with its parent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import dask
import pytest
from distributed import Client

from dask_memusage_exporter import install
from tests import tasks
from tests.conftest import FULL, local_cluster, rows, wait_until
from tests.receivers import receiver
from tests.servers import VictoriaMetrics

TASKS = 1_000
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def store(component: Callable[[str], str], tmp_path: Path) -> Iterator[VictoriaMetrics]:
    """A store that runs."""
    store = VictoriaMetrics(component("victoria-metrics"), tmp_path / "store")
    yield store
    store.stop()


@pytest.mark.component("victoria-metrics")
def test_a_thousand_tasks(
    store: VictoriaMetrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics over HTTP equal the CSV; spans over gRPC are all there, in one trace."""
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
        path = tmp_path / "memusage.csv"
        with (
            dask.config.set(FULL),
            local_cluster(n_workers=4) as cluster,
            Client(cluster) as client,
        ):
            install(cluster.scheduler, path)
            keys = [f"stored-{i}" for i in range(TASKS)]
            with dask.annotate(traceparent=f"00-{TRACE}-{PARENT}-01"):
                futures = client.map(tasks.array, [i % 3 for i in range(TASKS)], key=keys)
            client.gather(futures)
            of_task = {row["task_key"]: row for row in rows(path)}
            peaks = [int(row["peak_bytes"]) for row in of_task.values()]
            name = 'dask_worker_task_memory_peak_bytes_{}{{dask_task_prefix_name="stored"}}'
            count, total = (f"sum({name.format(part)})" for part in ("count", "sum"))
            wait_until(lambda: store.query(count) == [TASKS], what=count)
            assert store.query(total) == [sum(peaks)]
            # Restarted workers are other instances: what has been stays.
            assert len(store.query(name.format("count"))) == 4
            spans = wait_until(
                lambda: len(traces.spans("stored")) == TASKS and traces.spans("stored")
            )
    assert {span.attributes["dask.task.key"] for span in spans} == set(keys)
    for span in spans:
        row = of_task[span.attributes["dask.task.key"]]
        assert (span.data.trace_id.hex(), span.data.parent_span_id.hex()) == (TRACE, PARENT)
        assert span.attributes["dask.task.memory.peak"] == int(row["peak_bytes"])
        assert span.attributes["dask.task.memory.scope"] == row["scope"]
        assert str(span.attributes.get("dask.task.memory.growth", "")) == row["growth_bytes"]
        assert span.resource["dask.worker.address"] == row["worker"]
