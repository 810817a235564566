"""1,000 tasks on four workers: a real store of metrics, and every span with its parent."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client

from dask_memusage_exporter import install
from tests import tasks
from tests.conftest import FULL, local_cluster, rows, wait_until
from tests.receivers import Received, receiver
from tests.servers import VictoriaMetrics, free_port

TASKS = 1_000
KEYS = [f"stored-{i}" for i in range(TASKS)]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def store(component: Callable[[str], str], tmp_path: Path) -> Iterator[VictoriaMetrics]:
    """A store that runs."""
    store = VictoriaMetrics(component("victoria-metrics"), tmp_path / "store")
    yield store
    store.stop()


@pytest.fixture
def collector(
    component: Callable[[str, str], str], store: VictoriaMetrics, tmp_path: Path
) -> Iterator[str]:
    """The endpoint of a real collector that takes gRPC and hands on to the store by HTTP."""
    package = find_spec("rotel")
    directory = Path(package.origin).parent if package and package.origin else tmp_path
    program = next((one.name for one in directory.glob("rotel-*")), "rotel")
    address = f"127.0.0.1:{free_port()}"
    options = {
        "otlp-grpc-endpoint": address,
        "otlp-http-endpoint": f"127.0.0.1:{free_port()}",
        "exporter": "otlp",
        "otlp-exporter-protocol": "http",
        "otlp-exporter-metrics-endpoint": store.endpoint,
        # It wants all three; nothing of these is sent here.
        "otlp-exporter-traces-endpoint": f"{store.url}/none",
        "otlp-exporter-logs-endpoint": f"{store.url}/none",
    }
    with (tmp_path / "collector.log").open("w") as log:
        process = subprocess.Popen(
            [
                component(program, str(directory)),
                *("start", "--disable-batching"),
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield f"http://{address}"
    process.terminate()
    process.wait(30)


def send(monkeypatch: pytest.MonkeyPatch, **signals: tuple[str, str]) -> None:
    """Have each signal sent, soon, to an endpoint by a protocol."""
    for signal, (endpoint, protocol) in signals.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", endpoint)
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")


def below_parent() -> AbstractContextManager[Any]:
    """What is submitted there is below a span that somebody else has started."""
    return dask.annotate(traceparent=f"00-{TRACE}-{PARENT}-01")


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
        send(
            monkeypatch, METRICS=(store.endpoint, "http/protobuf"), TRACES=(traces.endpoint, "grpc")
        )
        with a_thousand_tasks(tmp_path / "memusage.csv", below_parent()) as of_task:
            name = 'dask_worker_task_memory_peak_bytes_{}{{dask_task_prefix_name="stored"}}'
            count, total = (f"sum({name.format(part)})" for part in ("count", "sum"))
            wait_until(lambda: store.query(count) == [TASKS], what=count)
            assert store.query(total) == [sum(peaks(of_task))]
            # Restarted workers are other instances: what has been stays.
            assert len(store.query(name.format("count"))) == 4
            check_spans(traces, of_task)


@pytest.mark.component("victoria-metrics")
@pytest.mark.component("rotel")
def test_metrics_over_grpc_and_spans_over_http(
    store: VictoriaMetrics, collector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: the store takes HTTP only, and a real collector stands before it."""
    with receiver() as traces:
        url = f"{traces.endpoint}/v1/traces"
        send(monkeypatch, METRICS=(collector, "grpc"), TRACES=(url, "http/protobuf"))
        with a_thousand_tasks(tmp_path / "memusage.csv", below_parent()) as of_task:

            def stored(name: str, more: str = "") -> list[float]:
                labels = f'dask_task_prefix_name="stored"{more}'
                return store.query(f"sum(dask_worker_task_memory_{name}{{{labels}}})")

            wait_until(lambda: stored("peak_bytes_count") == [TASKS])
            assert stored("peak_bytes_sum") == [sum(peaks(of_task))]
            grown = [int(g) for row in of_task.values() if (g := row["growth_bytes"])]
            if grown:
                wait_until(lambda: stored("growth_bytes_count") == [len(grown)])
                assert stored("growth_bytes_sum") == [sum(grown)]
            check_spans(traces, of_task)
            # A process is one instance, whatever it sends.
            instances = {one.resource["service.instance.id"] for one in traces.spans("stored")}
            assert len(instances) == 4
            counts = [
                stored("peak_bytes_count", f', service_instance_id="{one}"') for one in instances
            ]
            assert sum(count for (count,) in counts) == TASKS
