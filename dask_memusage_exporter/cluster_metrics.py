"""The whole cluster's metrics, as the scheduler shows them, on Prometheus and OpenTelemetry.

Covers: what workers have reported, kills, how many workers are measured and their limits.
Does not cover: workers' own pages (``process``), and how anything is written (``exporters``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import Metric

from dask_memusage_exporter import catalog
from dask_memusage_exporter.aggregate import Aggregate
from dask_memusage_exporter.config import prometheus_namespace
from dask_memusage_exporter.exemplars import Exemplars
from dask_memusage_exporter.exporters import prometheus
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.kills import Kills
from dask_memusage_exporter.worker import EXTENSION

if TYPE_CHECKING:
    from distributed import Scheduler


class ClusterMetrics:
    """Renders and observes what the scheduler holds; see ``prometheus.Renderer``, ``otlp.Source``.

    Parameters
    ----------
    source_of
        Returns where a worker's peaks come from; None where it has not said.
    """

    #: Whose metrics are observed here.
    server = "scheduler"

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        aggregate: Aggregate,
        exemplars: Exemplars,
        kills: Kills,
        health: Health,
        source_of: Callable[[str], str | None],
    ) -> None:
        self._scheduler, self._source_of = scheduler, source_of
        self.aggregate, self.health = aggregate, health
        self._exemplars, self._kills = exemplars, kills
        self._last_report: float | None = None

    def collect(self, *, own_page: bool = False) -> Iterable[Metric]:
        """Return the scheduler's metric families; see ``catalog``."""
        workers, limits, reports = self._workers()
        self._last_report = max(reports, default=self._last_report)
        return prometheus.scheduler_families(
            namespace=prometheus_namespace(),
            aggregate=self.aggregate,
            workers_by_source=workers,
            killed=self._killed(),
            worker_limit=min(limits, default=None),
            last_report=self._last_report,
            exemplars=self._exemplars if own_page else None,
        )

    def collect_health(self, *, own_page: bool = False) -> Iterable[Metric]:  # noqa: ARG002  # the same
        """Return those that tell of the exporter itself."""
        return prometheus.health_families(
            namespace=prometheus_namespace(), server=self.server, health=self.health, info={}
        )

    def observe(self, name: str) -> Iterable[tuple[tuple[str, ...], float | None]]:
        """Return the values of a metric that OpenTelemetry observes; from any thread."""
        from dask_memusage_exporter.exporters import otlp

        return otlp.scheduler_values(
            name,
            health=self.health,
            workers_by_source=lambda: self._workers()[0],
            killed=self._killed,
        )

    def _killed(self) -> dict[str, prometheus.KilledSnapshot]:
        self._kills.learn(list(self._scheduler.task_prefixes))
        return self._kills.snapshot()

    def _workers(self) -> tuple[dict[str, int], list[int], list[float]]:
        """Return workers by source, their memory limits, and when each was last heard of."""
        workers = dict.fromkeys(catalog.SOURCES, 0)
        limits: list[int] = []
        reports: list[float] = []
        # In one step: another cluster of this process may ask, from its own event loop.
        for state in list(dict.values(self._scheduler.workers)):
            said = state.metrics.get(EXTENSION)
            # A worker that has just joined has said hello, and its heartbeat is on its way.
            source = said.get("source") if isinstance(said, dict) else None
            source = source or self._source_of(state.address)
            workers[source if source in workers else "missing"] += 1
            if state.memory_limit:
                limits.append(state.memory_limit)
            if source in workers and source != "missing":
                reports.append(state.last_seen)
        return workers, limits, reports
