"""The one list of metrics: name, kind, unit, labels, help, where, stability.

Exporters build their families from it, and docs, dashboards and rules are checked against it.

To add a metric: 1. a line here, 2. its samples in ``exporters/prometheus.py`` and, where it has an
OpenTelemetry name, its values in ``exporters/otlp.py``, 3. run ``make docs`` for the table in
``docs/metrics.md``.
"""

from __future__ import annotations

from typing import NamedTuple


class Otel(NamedTuple):
    """A metric as OpenTelemetry has it; its attributes are the labels, by :data:`ATTRIBUTES`."""

    name: str
    #: In UCUM, as the semantic conventions want it.
    unit: str
    #: Who exports it: what each process knows itself, and nothing twice.
    on: tuple[str, ...]


class MetricSpec(NamedTuple):
    """One metric. The full name is ``{namespace}_{worker|scheduler}_{name}``."""

    name: str
    #: ``histogram``, ``gauge``, ``counter`` or ``info``, as in OpenMetrics.
    kind: str
    #: ``bytes``, ``seconds`` or empty.
    unit: str
    labels: tuple[str, ...]
    help: str
    #: Whose ``/metrics`` shows it.
    on: tuple[str, ...]
    #: None: not exported by OpenTelemetry.
    otel: Otel | None = None
    stability: str = "stable"


_PREFIX = ("task_prefix_name",)
_WORKER, _SCHEDULER, _BOTH = ("worker",), ("scheduler",), ("worker", "scheduler")

#: Attributes of OpenTelemetry's by the label that says the same.
ATTRIBUTES = {
    "task_prefix_name": "dask.task.prefix.name",
    "scope": "dask.task.memory.scope",
    "cause": "dask.task.kill.cause",
    "reason": "dask.memusage.drop.reason",
    "stage": "dask.memusage.stage",
    "source": "dask.memusage.source",
}

METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(
        "task_memory_peak_bytes", "histogram", "bytes", _PREFIX,
        "Peak resident memory of the process (children included) while a task ran; "
        "everybody's when tasks overlap.",
        _BOTH,
        Otel("dask.worker.task.memory.peak", "By", _WORKER),
    ),
    MetricSpec(
        "task_memory_growth_bytes", "histogram", "bytes", _PREFIX,
        "What a task itself added at its peak; only tasks of scope thread or process.",
        _BOTH,
        Otel("dask.worker.task.memory.growth", "By", _WORKER),
    ),
    MetricSpec(
        "task_memory_peak_maximum_bytes", "gauge", "bytes", _PREFIX,
        "Largest peak in the last memusage.maximum-window; a scrape changes nothing.",
        _BOTH,
        Otel("dask.worker.task.memory.peak_max", "By", _WORKER),
    ),
    MetricSpec(
        "task_memory_growth_maximum_bytes", "gauge", "bytes", _PREFIX,
        "Largest growth in the last memusage.maximum-window; a scrape changes nothing.",
        _BOTH,
        Otel("dask.worker.task.memory.growth_max", "By", _WORKER),
    ),
    MetricSpec(
        "task_memory_tasks", "counter", "", (*_PREFIX, "scope"),
        "Executions measured, by whose number the measurement is.",
        _BOTH,
        Otel("dask.worker.task.memory.tasks", "{task}", _WORKER),
    ),
    MetricSpec(
        "task_memory_dropped_records", "counter", "", ("reason",),
        "Records that were lost, by reason.",
        _BOTH,
        Otel("dask.memusage.dropped_records", "{record}", _BOTH),
    ),
    MetricSpec(
        "task_memory_errors", "counter", "", ("stage",),
        "Errors of the exporter itself, by stage; no task was affected.",
        _BOTH,
        Otel("dask.memusage.errors", "{error}", _BOTH),
    ),
    MetricSpec(
        "task_memory_overhead_seconds", "counter", "seconds", ("stage",),
        "Time that the exporter itself has spent, by stage.",
        _BOTH,
        Otel("dask.memusage.time", "s", _BOTH),
    ),
    MetricSpec(
        "task_memory_prefixes", "gauge", "", (),
        "Task prefixes that have a label of their own.",
        _BOTH,
        Otel("dask.memusage.prefix.count", "{prefix}", _WORKER),
    ),
    MetricSpec(
        "task_memory_overflow_tasks", "counter", "", (),
        "Tasks that count under __overflow__: beyond memusage.max-prefixes, or not wanted.",
        _BOTH,
        Otel("dask.memusage.overflow_tasks", "{task}", _WORKER),
    ),
    MetricSpec(
        "task_memory_exporter", "info", "", ("exporter_version", "source"),
        "The exporter's version, and on workers where peaks come from.",
        _BOTH,
    ),
    MetricSpec(
        "memory_limit_bytes", "gauge", "bytes", (),
        "The worker's memory limit; absent where there is none.",
        _WORKER,
        Otel("dask.worker.memory.limit", "By", _WORKER),
    ),
    MetricSpec(
        "task_memory_workers", "gauge", "", ("source",),
        "Connected workers by where their peaks come from; missing: the worker is not measured.",
        _SCHEDULER,
        Otel("dask.scheduler.task.memory.workers", "{worker}", _SCHEDULER),
    ),
    MetricSpec(
        "task_memory_input_bytes", "histogram", "bytes", _PREFIX,
        "Size of a task's dependencies, as Dask estimates it.",
        _SCHEDULER,
        Otel("dask.worker.task.memory.input", "By", _WORKER),
    ),
    MetricSpec(
        "task_memory_worker_limit_bytes", "gauge", "bytes", (),
        "The smallest memory limit of the connected workers; absent where none has one.",
        _SCHEDULER,
    ),
    MetricSpec(
        "task_memory_killed_tasks", "counter", "", (*_PREFIX, "cause"),
        "Tasks that were executing when their worker died, by cause: memory (known to be), "
        "signal (seen by the nanny), lost (all else).",
        _SCHEDULER,
        Otel("dask.scheduler.task.memory.killed_tasks", "{task}", _SCHEDULER),
    ),
    MetricSpec(
        "task_memory_killed_last_peak_bytes", "gauge", "bytes", _PREFIX,
        "Last peak of the process that was seen before the latest kill of this prefix.",
        _SCHEDULER,
        Otel("dask.scheduler.task.memory.killed_last_peak", "By", _SCHEDULER),
    ),
    MetricSpec(
        "task_memory_killed_last_timestamp_seconds", "gauge", "seconds", _PREFIX,
        "When the latest kill of this prefix was, in seconds since the epoch.",
        _SCHEDULER,
    ),
    MetricSpec(
        "task_memory_last_report_timestamp_seconds", "gauge", "seconds", (),
        "Last heartbeat of any measured worker, in seconds since the epoch; absent before one.",
        _SCHEDULER,
    ),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in METRICS}

#: Values of the label ``source`` on the scheduler.
SOURCES = ("kernel", "jemalloc", "polling", "missing")
