"""The scheduler's side: puts the bootstrap on every worker and takes their records in.

Covers: workers that are there and that come later, rows for the CSV, how many workers are measured.
Does not cover: the cluster's histograms; each worker shows its own.

The state lives in ``scheduler.extensions["memusage"]``: a plugin that is registered again finds it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps
from prometheus_client import Metric

from dask_memusage_exporter import __version__, catalog
from dask_memusage_exporter.bootstrap import ByValue
from dask_memusage_exporter.config import Settings, explicit, prometheus_namespace
from dask_memusage_exporter.exporters import RecordSink, prometheus
from dask_memusage_exporter.exporters.csv_file import CsvFile
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.records import from_row
from dask_memusage_exporter.worker import EXTENSION, RECORDS_OP

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger(__name__)


class SchedulerAgent:
    """One scheduler's measurement. Made by :meth:`MemusageSchedulerPlugin.start`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.health = Health()
        self.sinks: list[RecordSink] = []
        self._flush_waits = False
        # For the scheduler's life: an operation that it does not know closes a worker's stream.
        scheduler.stream_handlers[RECORDS_OP] = self.handle_records
        prometheus.add(self)

    def add_csv(self, path: str, columns: str) -> None:
        """Write a CSV from now on; a path that is being written already is left alone.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        csv_file = _same_file(self.sinks, path) or CsvFile(
            path, columns=columns, health=self.health
        )
        if csv_file not in self.sinks:
            self.add_sink(csv_file)
            logger.info("dask-memusage: writing %s", csv_file.path)

    def add_sink(self, sink: RecordSink) -> None:
        """Give every record to a sink from now on. :meth:`push` tells the workers."""
        self.sinks.append(sink)

    async def push(self) -> None:
        """Put the bootstrap on every worker that is there or will come."""
        options = {"settings": explicit(), "rows": bool(self.sinks)}
        try:
            await self.scheduler.register_worker_plugin(
                comm=None, plugin=dumps(ByValue(options)), name=ByValue.name, idempotent=False
            )
        except OSError as error:
            # A worker left while it was told. It needs nothing more; the others have been told.
            logger.info("dask-memusage: a worker went away while it was set up (%s)", error)

    def handle_records(
        self, rows: Iterable[tuple[Any, ...]] = (), worker: str = "", **_: Any
    ) -> None:
        """Take records in from a worker's stream; runs on the event loop and never raises."""
        with self.health.guard("record"):
            for row in rows:
                try:
                    record = from_row(row, worker)
                except (TypeError, IndexError) as error:
                    self.health.drop("invalid")
                    self.health.error("record", error)
                    continue
                for sink in self.sinks:
                    sink.write(record)
            if not self._flush_waits:
                # A record comes before the message that its task has finished, on the same
                # stream, and clients are told by a later round of the loop than the next one.
                self._flush_waits = True
                self.scheduler.loop.add_callback(self._flush)

    def _flush(self) -> None:
        self._flush_waits = False
        with self.health.guard("csv"):
            for sink in self.sinks:
                sink.flush()

    def collect(self) -> Iterable[Metric]:
        """Return the scheduler's metric families; see ``catalog``."""
        workers = dict.fromkeys(catalog.SOURCES, 0)
        for state in self.scheduler.workers.values():
            said = state.metrics.get(EXTENSION)
            source = said.get("source") if isinstance(said, dict) else None
            workers[source if source in workers else "missing"] += 1
        return prometheus.scheduler_families(
            namespace=prometheus_namespace(), health=self.health, workers_by_source=workers
        )

    def teardown(self) -> None:
        """Let everything go; ``Scheduler.close`` calls this on all extensions."""
        prometheus.remove(self)
        while self.sinks:
            self.sinks.pop().close()


class MemusageSchedulerPlugin(SchedulerPlugin):
    """Measures all tasks of a cluster: ``client.register_plugin(MemusageSchedulerPlugin())``.

    It puts what is needed on every worker itself. Registering it again is harmless, and may add a
    CSV.

    Parameters
    ----------
    csv_path
        A file on the scheduler's machine, overwritten if it is there; None: the setting
        ``memusage.csv.path``, which may be none.
    """

    name = EXTENSION

    def __init__(self, csv_path: str | None = None) -> None:
        self.csv_path = csv_path

    async def start(self, scheduler: Scheduler) -> None:
        """Begin, or add to what is there.

        Raises
        ------
        ConfigError
            A setting of the scheduler is wrong.
        OSError
            The CSV file cannot be written.
        """
        await begin(scheduler, self.csv_path)
        # Registered again: the state is kept, only the plugin object is replaced.
        scheduler.plugins.pop(self.name, None)


async def begin(
    scheduler: Scheduler, csv_path: str | None, *, tolerant: bool = False
) -> SchedulerAgent:
    """Begin to measure a scheduler's cluster; return the agent.

    Parameters
    ----------
    csv_path
        None: the setting ``memusage.csv.path``.
    tolerant
        Go on without a CSV that cannot be written, and say so in the log and in
        ``task_memory_errors_total{stage="csv"}``: for preloads, whose errors Dask only logs.
    """
    settings = Settings.load()
    agent = scheduler.extensions.get(EXTENSION)
    if not isinstance(agent, SchedulerAgent):
        agent = scheduler.extensions[EXTENSION] = SchedulerAgent(scheduler)
        logger.info("dask-memusage %s: measuring this scheduler's cluster", __version__)
    path = csv_path or settings.csv_path
    if path is not None:
        try:
            agent.add_csv(path, settings.csv_columns)
        except OSError as error:
            if not tolerant:
                raise
            agent.health.error("csv", error)
    await agent.push()
    return agent


def _same_file(sinks: Iterable[RecordSink], path: str) -> CsvFile | None:
    for sink in sinks:
        if isinstance(sink, CsvFile) and sink.path == os.path.abspath(path):
            return sink
    return None
