"""OpenTelemetry metrics: the catalog's metrics as instruments of a MeterProvider.

The SDK has no histogram that is observed, so histograms are recorded task by task, where records
are counted; what is a state (maxima, our own health, kills) is observed when it is exported.

Covers: names, units and attributes as in ``catalog``, several sources in one process.
Does not cover: whose provider it is (``providers``) and when it is there (``telemetry``).
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from opentelemetry.metrics import Meter, MeterProvider, Observation

from dask_memusage_exporter import __version__, catalog
from dask_memusage_exporter.aggregate import OVERFLOW, Aggregate
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.per_provider import PerProvider
from dask_memusage_exporter.records import TaskMemory

if TYPE_CHECKING:
    from dask_memusage_exporter.exporters.prometheus import KilledSnapshot

SCOPE_NAME = "dask_memusage_exporter"

#: Values of a metric's labels, in the catalog's order.
_Labels = tuple[str, ...]
#: Those, and the number that belongs to them.
Values = Iterable[tuple[_Labels, float | None]]
#: One series of a counter.
_Count = tuple[str, _Labels]

#: Recorded task by task, which is what costs; all others are observed.
_RECORDED = frozenset(
    {
        "task_memory_peak_bytes",
        "task_memory_growth_bytes",
        "task_memory_input_bytes",
    }
)


#: Series of clusters that have gone and labels that are remembered, as many as the SDK keeps of a
#: metric. A process may see any number of clusters, each with prefixes of its own.
_MOST = 2_000


class Source(Protocol):
    """What has metrics to observe: a process's workers, or a scheduler."""

    #: ``worker`` or ``scheduler``.
    server: str
    health: Health
    aggregate: Aggregate

    def observe(self, name: str) -> Values:
        """Return a metric's values as they stand now. From any thread."""


class Instruments:
    """Our instruments of one MeterProvider. Get them by :func:`instruments`."""

    def __init__(self, provider: MeterProvider, buckets: Sequence[float]) -> None:
        #: Whose states are observed. Instruments cannot be taken back, so sources come and go.
        self.sources: list[Source] = []
        #: What each had counted when it came: that is not ours to tell, and others may have.
        self._bases: dict[Source, dict[_Count, float]] = {}
        #: What those that have gone had counted here: a counter never falls.
        self._gone: dict[_Count, float] = {}
        self._lock = threading.Lock()
        self._attributes: dict[str, dict[str, str]] = {}
        meter = provider.get_meter(SCOPE_NAME, __version__)
        made = {
            spec.name: self._make(meter, spec, spec.otel, buckets)
            for spec in catalog.METRICS
            if spec.otel is not None
        }
        self._peak = made["task_memory_peak_bytes"]
        self._growth = made["task_memory_growth_bytes"]
        self._input = made["task_memory_input_bytes"]

    def _make(
        self,
        meter: Meter,
        spec: catalog.MetricSpec,
        otel: catalog.Otel,
        buckets: Sequence[float],
    ) -> Any:
        name, about = otel.name, {"unit": otel.unit, "description": spec.help}
        if spec.name in _RECORDED:
            return meter.create_histogram(
                name, explicit_bucket_boundaries_advisory=list(buckets), **about
            )
        callbacks = [lambda _: self._observed(spec, otel.on)]
        if spec.kind == "counter":
            return meter.create_observable_counter(name, callbacks=callbacks, **about)
        return meter.create_observable_gauge(name, callbacks=callbacks, **about)

    def add(self, source: Source) -> None:
        """Observe a source from now on."""
        with self._lock:
            self._bases[source] = dict(_counts(source))
            self.sources.append(source)

    def remove(self, source: Source) -> None:
        """Observe it no longer; what it has counted since it came stays."""
        with self._lock:
            if source not in self.sources:
                return
            self.sources.remove(source)
            base = self._bases.pop(source)
            for count, value in _counts(source):
                gone = value - base.get(count, 0)
                if count not in self._gone and len(self._gone) >= _MOST:
                    count = _overflowing(*count)
                self._gone[count] = self._gone.get(count, 0) + gone

    def record(self, record: TaskMemory, label: str) -> None:
        """Record one execution under a label that has passed our cap on prefixes."""
        attributes = self._attributes.get(label)
        if attributes is None:
            if len(self._attributes) >= _MOST:
                self._attributes.clear()
            attributes = self._attributes[label] = {catalog.ATTRIBUTES["task_prefix_name"]: label}
        self._peak.record(record.peak_bytes, attributes)
        if record.growth_bytes is not None:
            self._growth.record(record.growth_bytes, attributes)
        if record.input_bytes is not None:
            self._input.record(record.input_bytes, attributes)

    def _observed(self, spec: catalog.MetricSpec, on: tuple[str, ...]) -> Iterator[Observation]:
        """Return what all sources have of a metric, on a reader's thread."""
        with self._lock:
            values = self._values(spec, on)
        names = [catalog.ATTRIBUTES[label] for label in spec.labels]
        for labels, value in values.items():
            yield Observation(value, dict(zip(names, labels, strict=True)))

    def _values(self, spec: catalog.MetricSpec, on: tuple[str, ...]) -> dict[_Labels, float]:
        # Two sources in one process: sizes are the larger one's, all else adds up.
        merge: Callable[[Any, Any], Any] = (
            max if spec.kind == "gauge" and spec.unit else operator.add
        )
        values = {
            labels: value for (name, labels), value in self._gone.items() if name == spec.name
        }
        for source in list(self.sources):
            if source.server not in on:
                continue
            base = self._bases[source]
            try:
                for labels, value in source.observe(spec.name):
                    if value is not None:
                        value -= base.get((spec.name, labels), 0)
                        before = values.get(labels)
                        values[labels] = value if before is None else merge(before, value)
            except Exception as error:
                source.health.error("export", error)
        return values


def _overflowing(name: str, labels: _Labels) -> _Count:
    """Return where a series of a prefix counts that has no label of its own."""
    by_prefix = catalog.BY_NAME[name].labels[:1] == ("task_prefix_name",)
    return name, (OVERFLOW, *labels[1:]) if by_prefix else labels


def _counts(source: Source) -> Iterator[tuple[_Count, float]]:
    """Return what a source has counted of the metrics that are observed and never fall."""
    for spec in catalog.METRICS:
        if spec.kind == "counter" and spec.otel is not None and source.server in spec.otel.on:
            for labels, value in source.observe(spec.name):
                if value is not None:
                    yield (spec.name, labels), value


_known: PerProvider[Instruments] = PerProvider()


def instruments(provider: MeterProvider, buckets: Sequence[float]) -> Instruments:
    """Return our instruments of a provider: one set, however many clusters its process has seen.

    The first one's buckets stand; explicit buckets are what the provider's views and the standard
    variable leave them.
    """
    try:
        return _known.get(provider, lambda: Instruments(provider, buckets))
    except TypeError:  # another than the SDK's, which cannot be remembered
        return Instruments(provider, buckets)


def worker_values(
    name: str, *, aggregate: Aggregate, health: Health, memory_limit: int | None
) -> Values:
    """Return the values of a worker's metric that is observed."""
    if name == "task_memory_peak_maximum_bytes":
        return [((label,), peak) for label, peak, _ in aggregate.maxima()]
    if name == "task_memory_growth_maximum_bytes":
        return [((label,), growth) for label, _, growth in aggregate.maxima()]
    if name == "task_memory_tasks":
        return [((label, scope), count) for label, scope, count in aggregate.tasks()]
    if name == "task_memory_prefixes":
        return [((), aggregate.own_labels)]
    if name == "task_memory_overflow_tasks":
        return [((), aggregate.overflow_tasks)]
    if name == "memory_limit_bytes":
        return [((), memory_limit)]
    return _health_values(name, health)


def scheduler_values(
    name: str,
    *,
    health: Health,
    workers_by_source: Callable[[], Mapping[str, int]],
    killed: Callable[[], Mapping[str, KilledSnapshot]],
) -> Values:
    """Return the values of a scheduler's metric that is observed."""
    if name == "task_memory_workers":
        return _by_label(workers_by_source())
    if name == "task_memory_killed_tasks":
        return [
            ((label, cause), count)
            for label, one in killed().items()
            for cause, count in one.by_cause.items()
        ]
    if name == "task_memory_killed_last_peak_bytes":
        return [((label,), one.last_peak) for label, one in killed().items()]
    return _health_values(name, health)


def _health_values(name: str, health: Health) -> Values:
    # Of this process alone: each other one exports its own.
    counter = {
        "task_memory_dropped_records": "dropped",
        "task_memory_errors": "errors",
        "task_memory_overhead_seconds": "seconds",
    }[name]
    return _by_label(health.own(counter))


def _by_label(counts: Mapping[str, float]) -> Values:
    return [((label,), count) for label, count in counts.items()]
