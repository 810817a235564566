"""Prometheus: families on the ``/metrics`` that Dask's servers have already, no port of our own.

Dask renders the global registry on its event loop, so there is one collector a process, with a
cheap ``collect`` that never raises: an error here would take Dask's own metrics down.

Covers: the worker's and the scheduler's families in the text format 0.0.4 that Dask writes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import prometheus_client
from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from dask_memusage_exporter import __version__, catalog
from dask_memusage_exporter.aggregate import Aggregate, HistogramSnapshot, totals
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

    def collect(self) -> Iterable[Metric]:
        """Return the families as they stand now."""

    def collect_health(self) -> Iterable[Metric]:
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


def worker_families(
    *,
    namespace: str,
    mode: str,
    aggregate: Aggregate,
    memory_limit: int | None,
) -> list[Metric]:
    """Return the families of a worker's process.

    Parameters
    ----------
    namespace
        Dask's ``distributed.dashboard.prometheus.namespace``; may be empty.
    mode
        ``memusage.worker-metrics``: ``off`` is no families at all, ``totals`` has no prefix
        labels and no maxima.
    """
    if mode == "off":
        return []
    page = _Page(namespace, "worker")
    snapshots = aggregate.snapshot()
    bounds = [_le(bound) for bound in aggregate.bounds] + ["+Inf"]
    without = "task_prefix_name" if mode == "totals" else ""
    peak, growth, tasks = (
        page.family(name, without=without)
        for name in ("task_memory_peak_bytes", "task_memory_growth_bytes", "task_memory_tasks")
    )
    if mode == "totals":
        all_peaks, all_growths, all_tasks = totals(snapshots, aggregate.bounds)
        _histogram(peak, (), bounds, all_peaks)
        _histogram(growth, (), bounds, all_growths)
        for scope, count in all_tasks.items():
            tasks.add_metric((scope,), count)
    else:
        peak_maximum = page.family("task_memory_peak_maximum_bytes")
        growth_maximum = page.family("task_memory_growth_maximum_bytes")
        for one in snapshots:
            _histogram(peak, (one.label,), bounds, one.peak)
            _histogram(growth, (one.label,), bounds, one.growth)
            for scope, count in one.tasks.items():
                tasks.add_metric((one.label, scope), count)
            if one.peak_maximum is not None:
                peak_maximum.add_metric((one.label,), one.peak_maximum)
            if one.growth_maximum is not None:
                growth_maximum.add_metric((one.label,), one.growth_maximum)
    page.value("task_memory_prefixes", aggregate.own_labels)
    page.value("task_memory_overflow_tasks", aggregate.overflow_tasks)
    if memory_limit is not None:
        page.value("memory_limit_bytes", memory_limit)
    return page.families


def scheduler_families(*, namespace: str, workers_by_source: Mapping[str, int]) -> list[Metric]:
    """Return the families of a scheduler."""
    page = _Page(namespace, "scheduler")
    page.counts("task_memory_workers", workers_by_source)
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
    family: Any, labels: tuple[str, ...], bounds: list[str], snapshot: HistogramSnapshot
) -> None:
    buckets = list(zip(bounds, snapshot.cumulative, strict=True))
    family.add_metric(labels, buckets, snapshot.total)


def _merge(into: Metric, other: Metric) -> None:
    """Add one family's samples to another of the same name (two schedulers in one process)."""
    values = {(s.name, tuple(sorted(s.labels.items()))): s for s in into.samples}
    for sample in other.samples:
        key = (sample.name, tuple(sorted(sample.labels.items())))
        if key in values and into.type != "info":
            sample = sample._replace(value=values[key].value + sample.value)
        values[key] = sample
    into.samples = list(values.values())
