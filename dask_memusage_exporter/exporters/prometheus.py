"""Prometheus: families on the ``/metrics`` that Dask's servers have already, no port of our own.

Dask renders the global registry on its event loop, so there is one collector a process, with a
cheap ``collect`` that never raises: an error here would take Dask's own metrics down.

Covers: the worker's and the scheduler's families, for the text format 0.0.4 that Dask writes and
for the page that is ours alone.
Does not cover: that page itself (``openmetrics``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import prometheus_client
from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar as SampleExemplar
from prometheus_client.samples import Sample

from dask_memusage_exporter import __version__, catalog
from dask_memusage_exporter.aggregate import Aggregate, HistogramSnapshot, totals
from dask_memusage_exporter.exemplars import GROWTH, PEAK, Exemplar, Exemplars
from dask_memusage_exporter.health import Health

_FAMILIES: dict[str, Callable[..., Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
    "info": InfoMetricFamily,
}


class Renderer(Protocol):
    """What has families to show: a process's workers, or a scheduler."""

    health: Health

    def collect(self, *, own_page: bool = False) -> Iterable[Metric]:
        """Return the families as they stand now.

        Parameters
        ----------
        own_page
            For the page that is ours alone: all of them, with exemplars.
        """

    def collect_health(self, *, own_page: bool = False) -> Iterable[Metric]:
        """Return those that tell of itself: they are shown where the others fail."""


class ProcessCollector(Collector):
    """The one collector of a process; shows what its renderers have."""

    def __init__(self) -> None:
        self.renderers: list[Renderer] = []

    def describe(self) -> list[Metric]:
        """Claim no names: a name that Dask itself registers one day is Dask's."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Return the families of all renderers; what fails is left out and counted."""
        families: dict[str, Metric] = {}
        for renderer in list(self.renderers):
            for part in (renderer.collect, renderer.collect_health):
                with renderer.health.guard("render"):
                    for family in [one for one in part() if not self._taken(one)]:
                        if family.name in families:
                            _merge(families[family.name], family)
                        else:
                            families[family.name] = family
        return list(families.values())

    def _taken(self, family: Metric) -> bool:
        # The registry tells who owns a name only here; without it we would show a name twice,
        # which makes the whole page invalid.
        owners: Mapping[str, object] = getattr(
            prometheus_client.REGISTRY, "_names_to_collectors", {}
        )
        return any(
            owners.get(family.name + suffix, self) is not self
            for suffix in ("", "_total", "_info", "_bucket")
        )


_collector = ProcessCollector()
# A forked child would show a frozen copy of its parent's series.
os.register_at_fork(after_in_child=_collector.renderers.clear)
#: Two clusters in one process have an event loop each.
_lock = threading.Lock()


def add(renderer: Renderer) -> None:
    """Show a renderer's families on this process's ``/metrics`` from now on."""
    with _lock:
        if not _collector.renderers:
            prometheus_client.REGISTRY.register(_collector)
        _collector.renderers.append(renderer)


def remove(renderer: Renderer) -> None:
    """Show them no longer; with the last one the collector goes."""
    with _lock:
        if renderer in _collector.renderers:
            _collector.renderers.remove(renderer)
            if not _collector.renderers:
                with suppress(KeyError):  # somebody has emptied the registry
                    prometheus_client.REGISTRY.unregister(_collector)


class _Page:
    """Builds families from the catalog, under one server's names."""

    def __init__(self, namespace: str, server: str) -> None:
        self._start = f"{namespace}_{server}_" if namespace else f"{server}_"
        self._server = server
        self.families: list[Metric] = []

    def family(self, name: str, *, without: str = "") -> Any:
        """Start a family of the catalog, perhaps without one of its labels."""
        spec = catalog.BY_NAME[name]
        if self._server not in spec.on:
            raise KeyError(f"{name} is not a metric of the {self._server}")
        labels = [label for label in spec.labels if spec.kind != "info" and label != without]
        family = _FAMILIES[spec.kind](self._start + name, spec.help, labels=labels)
        self.families.append(family)
        return family

    def value(self, name: str, value: float) -> None:
        """Add a family with one sample and no labels."""
        self.family(name).add_metric((), value)

    def counts(self, name: str, counts: Mapping[str, float]) -> None:
        """Add a family with one sample a value of its one label."""
        family = self.family(name)
        for label, count in counts.items():
            family.add_metric((label,), count)

    def tasks(
        self, aggregate: Aggregate, *, inputs: bool, exemplars: Exemplars | None = None
    ) -> None:
        """Add everything counted of tasks, by prefix."""
        bounds = _bounds(aggregate)
        peak, growth = (self.family(f"task_memory_{name}_bytes") for name in ("peak", "growth"))
        input_size = self.family("task_memory_input_bytes") if inputs else None
        maxima = [self.family(f"task_memory_{name}_maximum_bytes") for name in ("peak", "growth")]
        tasks = self.family("task_memory_tasks")
        for one in aggregate.snapshot():
            _histogram(peak, one.label, bounds, one.peak)
            _histogram(growth, one.label, bounds, one.growth)
            if input_size is not None:
                _histogram(input_size, one.label, bounds, one.input)
            if exemplars is not None:
                _exemplify(peak, len(bounds), exemplars.of(one.label, PEAK))
                _exemplify(growth, len(bounds), exemplars.of(one.label, GROWTH))
            for family, value in zip(maxima, (one.peak_maximum, one.growth_maximum), strict=True):
                if value is not None:
                    family.add_metric((one.label,), value)
            for scope, count in one.tasks.items():
                tasks.add_metric((one.label, scope), count)
        self.value("task_memory_prefixes", aggregate.own_labels)
        self.value("task_memory_overflow_tasks", aggregate.overflow_tasks)

    def totals(self, aggregate: Aggregate) -> None:
        """Add the same with no prefix label and no maxima."""
        bounds = _bounds(aggregate)
        all_peaks, all_growths, all_tasks = totals(aggregate.snapshot(), aggregate.bounds)
        for name, histogram in (("peak", all_peaks), ("growth", all_growths)):
            family = self.family(f"task_memory_{name}_bytes", without="task_prefix_name")
            _histogram(family, None, bounds, histogram)
        tasks = self.family("task_memory_tasks", without="task_prefix_name")
        for scope, count in all_tasks.items():
            tasks.add_metric((scope,), count)
        self.value("task_memory_prefixes", aggregate.own_labels)
        self.value("task_memory_overflow_tasks", aggregate.overflow_tasks)


def worker_families(
    *,
    namespace: str,
    mode: str,
    aggregate: Aggregate,
    memory_limit: int | None,
    exemplars: Exemplars | None = None,
) -> list[Metric]:
    """Return the families of a worker's process.

    Parameters
    ----------
    namespace
        Dask's ``distributed.dashboard.prometheus.namespace``; may be empty.
    mode
        ``memusage.worker-metrics``: ``off`` is no families at all, ``totals`` has no prefix
        labels and no maxima.
    exemplars
        None: without.
    """
    if mode == "off":
        return []
    page = _Page(namespace, "worker")
    if mode == "totals":
        page.totals(aggregate)
    else:
        page.tasks(aggregate, inputs=False, exemplars=exemplars)
    if memory_limit is not None:
        page.value("memory_limit_bytes", memory_limit)
    return page.families


class KilledSnapshot(NamedTuple):
    """What is known of the kills of one label."""

    by_cause: Mapping[str, int]
    #: Bytes, and seconds since the epoch, of the latest; None: no kill, or no peak was seen.
    last_peak: int | None
    last_time: float | None


def scheduler_families(
    *,
    namespace: str,
    aggregate: Aggregate,
    workers_by_source: Mapping[str, int],
    killed: Mapping[str, KilledSnapshot],
    worker_limit: int | None,
    last_report: float | None,
    exemplars: Exemplars | None = None,
) -> list[Metric]:
    """Return the families of a scheduler: its whole cluster's.

    Parameters
    ----------
    killed
        By label; every label that is known, so that a first kill is a rise from 0.
    worker_limit
        The smallest memory limit of the connected workers in bytes.
    last_report
        When a measured worker was last heard of, in seconds since the epoch.
    exemplars
        None: without.
    """
    page = _Page(namespace, "scheduler")
    page.tasks(aggregate, inputs=True, exemplars=exemplars)
    killed_tasks = page.family("task_memory_killed_tasks")
    peaks = page.family("task_memory_killed_last_peak_bytes")
    times = page.family("task_memory_killed_last_timestamp_seconds")
    for label, one in killed.items():
        for cause, count in one.by_cause.items():
            killed_tasks.add_metric((label, cause), count)
        if one.last_peak is not None:
            peaks.add_metric((label,), one.last_peak)
        if one.last_time is not None:
            times.add_metric((label,), one.last_time)
    page.counts("task_memory_workers", workers_by_source)
    if worker_limit is not None:
        page.value("task_memory_worker_limit_bytes", worker_limit)
    if last_report is not None:
        page.value("task_memory_last_report_timestamp_seconds", last_report)
    return page.families


def health_families(
    *, namespace: str, server: str, health: Health, info: Mapping[str, str]
) -> list[Metric]:
    """Return what both servers say of themselves; ``info`` besides the version."""
    page = _Page(namespace, server)
    page.counts("task_memory_dropped_records", health.dropped)
    page.counts("task_memory_errors", health.errors)
    page.counts("task_memory_overhead_seconds", health.seconds)
    about = {"exporter_version": __version__, **info}
    page.family("task_memory_exporter").add_metric((), about)
    return page.families


def _bounds(aggregate: Aggregate) -> list[str]:
    return [_le(bound) for bound in aggregate.bounds] + ["+Inf"]


def _le(bound: int) -> str:
    """Return a bound as Prometheus itself writes it, so that all versions agree on the label.

    (As Go's ``FormatFloat(bound, 'g', -1, 64)``; ``prometheus_client.utils.floatToGoString`` has
    changed between releases.)
    """
    digits, exponent = str(bound).rstrip("0"), len(str(bound)) - 1
    if exponent < 6:
        return f"{bound}.0"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{digits[0]}{fraction}e+{exponent:02d}"


def _histogram(
    family: Metric, label: str | None, bounds: list[str], snapshot: HistogramSnapshot
) -> None:
    """Add one histogram; None is no prefix label.

    What ``HistogramMetricFamily.add_metric`` does, at a third of its time: these are nearly all
    samples of a page, and Dask renders it on its event loop.
    """
    name, labels = family.name, {} if label is None else {"task_prefix_name": label}
    samples, bucket = family.samples, f"{family.name}_bucket"
    for bound, count in zip(bounds, snapshot.cumulative, strict=True):
        samples.append(Sample(bucket, {**labels, "le": bound}, count))
    samples.append(Sample(f"{name}_count", labels, snapshot.cumulative[-1]))
    samples.append(Sample(f"{name}_sum", labels, snapshot.total))


def _exemplify(family: Metric, buckets: int, exemplars: Mapping[int, Exemplar]) -> None:
    """Give the buckets of the histogram that was added last their exemplars."""
    first = len(family.samples) - buckets - 2  # count and sum come after them
    for bucket, one in exemplars.items():
        ids = {"trace_id": one.trace_id, "span_id": one.span_id}
        family.samples[first + bucket] = family.samples[first + bucket]._replace(
            exemplar=SampleExemplar(ids, one.value, one.time)
        )


def _merge(into: Metric, other: Metric) -> None:
    """Add one family's samples to another of the same name (two schedulers in one process)."""
    values = {(s.name, tuple(sorted(s.labels.items()))): s for s in into.samples}
    for sample in other.samples:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        if key in values and into.type != "info":
            sample = sample._replace(value=values[key].value + sample.value)
        values[key] = sample
    into.samples = list(values.values())
