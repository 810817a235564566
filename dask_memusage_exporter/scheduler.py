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
from dask_memusage_exporter.config import ConfigError, Settings, explicit, prometheus_namespace
from dask_memusage_exporter.exporters import RecordSink, prometheus
from dask_memusage_exporter.exporters.csv_file import CsvFile
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.records import from_row
from dask_memusage_exporter.worker import EXTENSION, RECORDS_OP

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("distributed.scheduler.memusage")


class SchedulerAgent:
    """One scheduler's measurement. Made by :func:`prepare`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.health = Health("scheduler")
        self.sinks: list[RecordSink] = []
        self._flush_waits = False

    def start(self) -> None:
        """Take the scheduler over."""
        self.scheduler.extensions[EXTENSION] = self
        # For the scheduler's life: an operation that it does not know closes a worker's stream.
        self.scheduler.stream_handlers[RECORDS_OP] = self.handle_records
        prometheus.add(self)
        logger.info("dask-memusage %s: measuring this scheduler's cluster", __version__)

    def add_csv(self, path: str | os.PathLike[str], columns: str) -> None:
        """Write a CSV from now on; a file that is being written already is left alone.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        if not any(isinstance(sink, CsvFile) and sink.is_at(path) for sink in self.sinks):
            csv_file = CsvFile(path, columns=columns, health=self.health)
            self.add_sink(csv_file)
            logger.info("dask-memusage: writing %s", csv_file.path)

    def add_sink(self, sink: RecordSink) -> None:
        """Give every record to a sink from now on. :meth:`push` tells the workers."""
        self.sinks.append(sink)

    async def push(self) -> None:
        """Put the bootstrap on every worker that is there or will come."""
        settings = {key: value for key, value in explicit().items() if not key.startswith("csv.")}
        plugin = dumps(ByValue({"settings": settings, "rows": bool(self.sinks)}))
        # What Scheduler.register_worker_plugin does, which gives up at the first worker that
        # leaves while it is told: the others must be waited for.
        self.scheduler.worker_plugins[ByValue.name] = plugin
        await self.scheduler.broadcast(
            msg={"op": "plugin-add", "plugin": plugin, "name": ByValue.name}, on_error="ignore"
        )

    def handle_records(self, rows: object = (), worker: str = "", **_: Any) -> None:
        """Take records in from a worker's stream; runs on the event loop and never raises."""
        with self.health.guard("record"):
            for row in rows if isinstance(rows, (tuple, list)) else (rows,):
                try:
                    record = from_row(row, worker)
                except Exception as error:
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
        # In one step: another cluster of this process may ask, from its own event loop.
        for state in list(dict.values(self.scheduler.workers)):
            said = state.metrics.get(EXTENSION)
            source = said.get("source") if isinstance(said, dict) else None
            workers[source if source in workers else "missing"] += 1
        return prometheus.scheduler_families(
            namespace=prometheus_namespace(), workers_by_source=workers
        )

    def collect_health(self) -> Iterable[Metric]:
        """Return those that tell of the exporter itself."""
        return prometheus.health_families(
            namespace=prometheus_namespace(), server="scheduler", health=self.health, info={}
        )

    def teardown(self) -> None:
        """Let everything go; ``Scheduler.close`` calls this on all extensions."""
        prometheus.remove(self)
        while self.sinks:
            self.sinks.pop().close()


class MemusageSchedulerPlugin(SchedulerPlugin):
    """Measures all tasks of a cluster: ``client.register_plugin(MemusageSchedulerPlugin())``.

    It puts what is needed on every worker itself. Registering it again is harmless, and may add a
    CSV. ``client.unregister_worker_plugin("memusage")`` stops measuring.

    Parameters
    ----------
    csv_path
        A file on the scheduler's machine, overwritten if it is there; None: the setting
        ``memusage.csv.path``, which may be none.
    """

    name = EXTENSION

    def __init__(self, csv_path: str | os.PathLike[str] | None = None) -> None:
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
        await prepare(scheduler, self.csv_path).push()
        # Registered again: the state is kept, only the plugin object is replaced.
        scheduler.plugins.pop(self.name, None)


def prepare(
    scheduler: Scheduler, csv_path: str | os.PathLike[str] | None, *, tolerant: bool = False
) -> SchedulerAgent:
    """Set measuring up on a scheduler, or add a CSV; :meth:`SchedulerAgent.push` begins.

    Parameters
    ----------
    csv_path
        None: the setting ``memusage.csv.path``.
    tolerant
        Go on without a CSV that cannot be written, and say so in the log and in
        ``task_memory_errors_total{stage="csv"}``: for preloads, whose errors Dask only logs.

    Raises
    ------
    ConfigError, OSError
        Nothing is set up then.
    """
    settings = Settings.load()
    known = scheduler.extensions.get(EXTENSION)
    agent = known if isinstance(known, SchedulerAgent) else SchedulerAgent(scheduler)
    path = csv_path or settings.csv_path
    if path is not None:
        try:
            agent.add_csv(path, settings.csv_columns)
        except OSError as error:
            if not tolerant:
                raise
            agent.health.error("csv", error)
    if agent is not known:
        agent.start()
    return agent


async def on_preload(scheduler: Scheduler, csv_path: str | None = None) -> None:
    """Begin from a preload: what is wrong is one line in the log, and the scheduler runs on."""
    try:
        agent = prepare(scheduler, csv_path, tolerant=True)
    except ConfigError as error:
        logger.warning("dask-memusage: nothing is measured. %s", error)
    else:
        await agent.push()
