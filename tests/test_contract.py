"""The contract where no other test spells it out: OpenTelemetry's names, and those of spans."""

from __future__ import annotations

from dask.utils import key_split

from dask_memusage_exporter import catalog
from tests import tasks
from tests.conftest import wait_until
from tests.tasks import Gate
from tests.test_otel_spans import UNSET, one_span, spanned

PREFIX = "dask.task.prefix.name"

#: Unit, kind, attributes; whoever has a panel of one has it by these.
INSTRUMENTS = {
    "dask.worker.task.memory.peak": ("By", "histogram", {PREFIX}),
    "dask.worker.task.memory.growth": ("By", "histogram", {PREFIX}),
    "dask.worker.task.memory.input": ("By", "histogram", {PREFIX}),
    "dask.worker.task.memory.peak_max": ("By", "gauge", {PREFIX}),
    "dask.worker.task.memory.growth_max": ("By", "gauge", {PREFIX}),
    "dask.worker.task.memory.tasks": ("{task}", "counter", {PREFIX, "dask.task.memory.scope"}),
    "dask.worker.memory.limit": ("By", "gauge", set()),
    "dask.scheduler.task.memory.killed_tasks": (
        "{task}",
        "counter",
        {PREFIX, "dask.task.kill.cause"},
    ),
    "dask.scheduler.task.memory.killed_last_peak": ("By", "gauge", {PREFIX}),
    "dask.scheduler.task.memory.workers": ("{worker}", "gauge", {"dask.memusage.source"}),
    "dask.memusage.dropped_records": ("{record}", "counter", {"dask.memusage.drop.reason"}),
    "dask.memusage.errors": ("{error}", "counter", {"dask.memusage.stage"}),
    "dask.memusage.time": ("s", "counter", {"dask.memusage.stage"}),
    "dask.memusage.prefix.count": ("{prefix}", "gauge", set()),
    "dask.memusage.overflow_tasks": ("{task}", "counter", set()),
}


def test_instruments_are_the_contracts() -> None:
    """Neither more nor less; that they are what is sent, `test_otel_metrics` sees."""
    assert {
        spec.otel.name: (
            spec.otel.unit,
            spec.kind,
            {catalog.ATTRIBUTES[label] for label in spec.labels},
        )
        for spec in catalog.METRICS
        if spec.otel is not None
    } == INSTRUMENTS


def test_spans_of_odd_keys(go: Gate) -> None:
    """Names are prefixes and few of them, nothing is longer than 255, and what is cut is whole.

    A task that was cancelled has not failed.
    """
    env = {"OTEL_METRICS_EXPORTER": "otlp"}
    # What a worker's own page shows has no say in what is sent.
    config = {"memusage.max-prefixes": 2, "memusage.worker-metrics": "off"}
    long, odd = "x" * 10_000, "naïve-ключ-1"
    with spanned(config=config, env=env) as (cluster, received):
        client = cluster.client
        for key in (long, odd, "third-1"):
            client.submit(tasks.nothing, key=key).result()
        cut = one_span(received, long[:255])
        for name in ("dask.task.key", "dask.task.prefix.name", "dask.task.group.name"):
            assert cut.attributes[name] == long[:255]
        one = one_span(received, key_split(odd))
        assert one.attributes["dask.task.key"] == odd
        assert one.attributes["dask.task.prefix.name"] == key_split(odd)
        unnamed = one_span(received, "dask.task")
        assert unnamed.attributes["dask.task.prefix.name"] == "third"
        peak = "dask.worker.task.memory.peak"
        wait_until(lambda: received.total(peak, "__overflow__") == 1)
        assert received.total(peak, long[:255]) == received.total(peak, key_split(odd)) == 1

        future = client.submit(tasks.wait_for, go.path, key="third-2")
        wait_until(lambda: go.reached)
        future.cancel()
        wait_until(lambda: "third-2" not in cluster.cluster.scheduler.tasks)
        go.open()
        cancelled = one_span(received, "dask.task", 2)
        assert [r.status for r in cluster.records.of("third")] == ["finished", "cancelled"]
        assert cancelled.attributes["dask.task.key"] == "third-2"
        assert cancelled.data.status.code == UNSET
        assert "error.type" not in cancelled.attributes
