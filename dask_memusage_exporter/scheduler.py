"""The scheduler's side: puts the bootstrap on every worker and takes in what they report.

Covers: workers that are there and that come later, the whole cluster's counts, kills, single
records for sinks, how many workers are measured.

The state lives in ``scheduler.extensions["memusage"]``: a plugin that is registered again finds it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps
from prometheus_client import Metric
from tornado.ioloop import PeriodicCallback

from dask_memusage_exporter import __version__, catalog, http, providers
from dask_memusage_exporter.aggregate import Aggregate, checked, is_count
from dask_memusage_exporter.bootstrap import ByValue, NannyByValue
from dask_memusage_exporter.config import ConfigError, Settings, explicit, prometheus_namespace
from dask_memusage_exporter.deaths import Deaths
from dask_memusage_exporter.exemplars import Exemplars
from dask_memusage_exporter.exemplars import checked as checked_exemplars
from dask_memusage_exporter.exporters import RecordSink, prometheus
from dask_memusage_exporter.exporters.csv_file import CsvFile
from dask_memusage_exporter.exporters.recordings import START_OP, STOP_OP, RecordingSink
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.kills import Kill, Kills, describe, to_record
from dask_memusage_exporter.records import from_row
from dask_memusage_exporter.reporter import BATCH_OP, GOODBYE_OP, HELLO_OP, LEAVING_OP, RECORDS_OP
from dask_memusage_exporter.telemetry import Telemetry
from dask_memusage_exporter.worker import EXTENSION

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("distributed.scheduler.memusage")

#: Seconds for which it is remembered what workers that have gone had reported.
_LATE = 3600
#: Seconds that a recording waits at most for what became of workers that died in its block.
_PATIENCE = 5.0
#: Seconds in which workers that join are told of together, and how many by name.
_MOMENT, _NAMED = 1.0, 10
#: Seconds between looks whose OpenTelemetry providers there are.
_FOLLOW = 1.0


class SchedulerAgent:
    """One scheduler's measurement. Made by :func:`prepare`."""

    #: Whose metrics are observed here; see :class:`otlp.Source`.
    server = "scheduler"

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler = scheduler
        self.health = Health("scheduler")
        self._settings = settings
        self.sinks: list[RecordSink] = []
        self.aggregate = Aggregate(
            bounds=settings.buckets,
            max_prefixes=settings.max_prefixes,
            maximum_window=settings.maximum_window,
            wanted=settings.wants,
        )
        self.exemplars = Exemplars(settings.buckets, settings.max_prefixes + 1)
        self.kills = Kills(self.aggregate)
        self.deaths = Deaths(
            scheduler,
            on_kill=self._on_kill,
            on_end=self._on_end,
            on_error=lambda error: self.health.error("record", error),
        )
        #: Records that workers have reported in batches, by incarnation: of those that live, and of
        #: those that have gone for a while.
        self._received: dict[str, int] = {}
        self._recordings: dict[str, RecordingSink] = {}
        self._flush_waits = self._said_overlap = False
        self._wants_jemalloc = self._said_bare = False
        #: Workers that nobody can have start on jemalloc, until that is said.
        self._bare: set[str] = set()
        self._last_report: float | None = None

    def start(self) -> None:
        """Take the scheduler over."""
        self.scheduler.extensions[EXTENSION] = self
        # For the scheduler's life: an operation that it does not know closes a worker's stream.
        self.scheduler.stream_handlers[RECORDS_OP] = self.handle_records
        self.scheduler.stream_handlers[BATCH_OP] = self.handle_batch
        self.scheduler.stream_handlers[HELLO_OP] = self.handle_hello
        self.scheduler.stream_handlers[GOODBYE_OP] = self.handle_goodbye
        self.scheduler.handlers[LEAVING_OP] = self.handle_leaving
        self.scheduler.handlers[START_OP] = self.start_recording
        self.scheduler.handlers[STOP_OP] = self.stop_recording
        self.scheduler.add_plugin(_Events(self), name=_Events.name)
        with self.health.guard("render"):
            http.add_routes(self.scheduler)
            http.add_metrics(self.scheduler, lambda: self)
        prometheus.add(self)
        identity = providers.identity("scheduler", id=self.scheduler.id)
        self._telemetry = Telemetry(self, identity, self._settings)
        # An application may set its providers while the cluster is idle. A scheduler that starts
        # starts this too, and one that ends stops it.
        follow = PeriodicCallback(self._telemetry.refresh, _FOLLOW * 1000)
        self.scheduler.periodic_callbacks[EXTENSION] = follow
        self.scheduler.loop.add_callback(self._start_following)
        logger.info("dask-memusage %s: measuring this scheduler's cluster", __version__)

    def _start_following(self) -> None:
        follow = self.scheduler.periodic_callbacks.get(EXTENSION)
        if follow is not None and not follow.is_running():
            follow.start()

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

    async def begin(self, jemalloc: bool | str | None = None) -> None:
        """Measure: jemalloc on the nannies first, where it is wanted, for it starts workers anew.

        Parameters
        ----------
        jemalloc
            See :func:`install.install`; None: as the setting says.
        """
        wanted = self._settings.jemalloc if jemalloc is None else jemalloc
        if wanted:
            path = None if wanted is True else wanted
            await self.scheduler.register_nanny_plugin(
                comm=None,
                plugin=dumps(NannyByValue({"path": path})),
                name=NannyByValue.name,
                idempotent=False,
            )
            self._wants_jemalloc = True
        await self.push()
        for worker in self.scheduler.workers:
            self._heed_nanny(worker)

    async def push(self) -> None:
        """Put the bootstrap on every worker that is there or will come."""
        plugin = dumps(ByValue(self._options()))
        # What Scheduler.register_worker_plugin does, which gives up at the first worker that
        # leaves while it is told: the others must be waited for.
        self.scheduler.worker_plugins[ByValue.name] = plugin
        await self.scheduler.broadcast(
            msg={"op": "plugin-add", "plugin": plugin, "name": ByValue.name}, on_error="ignore"
        )

    def _options(self) -> dict[str, Any]:
        """Return what the workers must know; the CSV is none of their business."""
        return {
            "settings": {k: v for k, v in explicit().items() if not k.startswith("csv.")},
            "listens": self.scheduler.id,
            "rows": bool(self.sinks),
        }

    def handle_batch(
        self,
        worker: str = "",
        incarnation: str | None = None,
        records: int = 0,
        buckets: int = 0,
        fingerprint: int | None = None,
        prefixes: Iterable[Any] = (),
        health: Mapping[str, Any] | None = None,
        exemplars: Iterable[Any] = (),
        **_: Any,
    ) -> None:
        """Add a worker's counts to the cluster's, all or none; runs on the event loop.

        Never raises. A batch whose health or exemplars are wrong still has its counts.
        """
        self._telemetry.refresh()
        counted = False
        with self.health.guard("aggregate"):
            try:
                tallies = self._checked(
                    worker, incarnation, records, buckets, fingerprint, prefixes
                )
            except ValueError:
                # At least one, where even the number is none.
                self.health.drop("invalid", records if is_count(records) else 1)
                self._receive(incarnation, records)
                raise
            self.aggregate.add(tallies)
            self._receive(incarnation, records)
            counted = True
        with self.health.guard("aggregate"):
            self.health.add(_checked_rises(health or {}))
        with self.health.guard("aggregate"):
            if exemplars and counted:
                self.exemplars.merge(checked_exemplars(exemplars), self.aggregate.counted_under)

    def _receive(self, incarnation: Any, records: Any) -> None:
        """Remember what has come of a process, taken in or not: it is not lost with it again."""
        if type(incarnation) is str and is_count(records):
            self._received[incarnation] = self._received.get(incarnation, 0) + records

    def _checked(
        self,
        worker: str,
        incarnation: Any,
        records: Any,
        buckets: Any,
        fingerprint: Any,
        prefixes: Iterable[Any],
    ) -> list[tuple[str, tuple[Any, ...]]]:
        """Return a batch that can be added; ValueError where it cannot."""
        bounds = self.aggregate.bounds
        # Workers of before the fingerprint send the number alone.
        known = type(fingerprint) is int
        if buckets != len(bounds) or (known and fingerprint != self.aggregate.fingerprint):
            raise ValueError(
                f"worker {worker} counts in {buckets} buckets and not in the scheduler's "
                f"{len(bounds)}, or with other bounds; restart it, to take the scheduler's settings"
            )
        if not is_count(records) or not (incarnation is None or type(incarnation) is str):
            raise ValueError(f"worker {worker} sent no batch of counts")
        return checked(prefixes, len(bounds) + 1)

    def handle_hello(
        self,
        worker: str = "",
        home: Any = None,
        health: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Take note of a worker that reports."""
        with self.health.guard("record"):
            self.deaths.hello(worker, home or {})
            self._heed_nanny(worker)
            self.health.add(_checked_rises(health or {}))

    def _heed_nanny(self, worker: str) -> None:
        """Take note of a worker that is not on jemalloc and has no nanny to start it anew."""
        state, source = self.scheduler.workers.get(worker), self.deaths.source_of(worker)
        if not self._wants_jemalloc or self._said_bare or state is None or state.nanny:
            return
        if source not in (None, "jemalloc"):  # None: it has not said hello yet
            if not self._bare:
                self.scheduler.loop.call_later(_MOMENT, self._say_bare)
            self._bare.add(worker)

    def _say_bare(self) -> None:
        """Warn once, or it would be a line for each that joins."""
        self._said_bare = True
        names, more = sorted(self._bare)[:_NAMED], len(self._bare) - _NAMED
        self._bare.clear()
        logger.warning(
            "dask-memusage: jemalloc cannot be turned on for workers without a nanny: %s%s. Start "
            "their processes with the variables that `dask memusage doctor` prints on their "
            "machine, or start them with a nanny",
            ", ".join(names),
            f" and {more} more" if more > 0 else "",
        )

    def handle_goodbye(
        self,
        worker: str = "",
        incarnation: str | None = None,
        observed: int | None = None,
        health: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Take note of a worker that ends in order."""
        with self.health.guard("record"):
            self.deaths.goodbye(worker, incarnation, observed)
            self.health.add(_checked_rises(health or {}))

    async def handle_leaving(
        self, worker: str = "", batches: Iterable[Mapping[str, Any]] = (), **parting: Any
    ) -> None:
        """Hear the same by a connection of its own: where the stream is broken, or of a nanny."""
        with self.health.guard("aggregate"):
            for batch in batches:
                self.handle_batch(worker=worker, **batch)
        parting.pop("comm", None)
        self.handle_goodbye(worker=worker, **parting)

    async def start_recording(self, client: str | None = None) -> str:
        """Keep all records from now on; return the token to fetch them by. Called by a client.

        Parameters
        ----------
        client
            Its id: with it the recording goes. None: it stays until it is fetched.
        """
        token = uuid.uuid4().hex
        self._recordings[token] = RecordingSink(client)
        self.add_sink(self._recordings[token])
        await self.push()
        if client is not None and client not in self.scheduler.clients:
            self.forget_client(client)  # it went before it was heard
        return token

    async def stop_recording(self, token: str) -> tuple[list[tuple[Any, ...]], int] | None:
        """Return the records kept and how many were left out. Called by a client.

        None: nothing is kept any more, for the client had been gone or the scheduler closes.
        """
        sink = self._recordings.pop(token, None)
        if sink is None:
            return None
        sink.end(time.time())
        # The client hears that a worker died before we know which task it ran.
        deaths, most = self.deaths.unsettled, time.monotonic() + _PATIENCE
        while deaths & self.deaths.unsettled and time.monotonic() < most:
            await asyncio.sleep(0.02)
        if sink not in self.sinks:
            return None  # the scheduler has closed meanwhile
        self.sinks.remove(sink)
        await self.push()
        return sink.records, sink.left_out

    def forget_client(self, client: str) -> None:
        """Drop the recordings of a client that has gone: nobody will fetch them."""
        gone = [token for token, sink in self._recordings.items() if sink.client == client]
        for token in gone:
            self.sinks.remove(self._recordings.pop(token))
        if gone:
            self.scheduler.loop.add_callback(self.push)

    def _on_kill(self, kill: Kill) -> None:
        self.kills.count(kill)
        line = describe(kill)
        logger.warning("dask-memusage: %s", line)
        record = to_record(kill)
        for sink in self.sinks:
            sink.write(record)
        self._flush()
        self.scheduler.log_event(
            EXTENSION, {"action": "killed", "message": line, **kill._asdict(), "key": str(kill.key)}
        )

    def _on_end(self, incarnation: str, observed: int | None) -> None:
        """Count what a process that has ended had measured and could not report any more."""
        if observed is None:  # somebody may still tell
            self.scheduler.loop.call_later(_LATE, self._received.pop, incarnation, None)
            return
        lost = observed - self._received.pop(incarnation, 0)
        if lost > 0:
            self.health.drop("worker_gone", lost)

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
                if record.reason == "overlap" and not self._said_overlap:
                    self._say_overlap(worker)
            if not self._flush_waits:
                # A record comes before the message that its task has finished, on the same
                # stream, and clients are told by a later round of the loop than the next one.
                self._flush_waits = True
                self.scheduler.loop.add_callback(self._flush)

    def _say_overlap(self, worker: str) -> None:
        """Warn once who reads the old tool's columns as sizes of tasks."""
        if self.deaths.source_of(worker) == "jemalloc":
            return  # few have no growth there, and what would be said is done
        if any(isinstance(sink, CsvFile) for sink in self.sinks):
            self._said_overlap = True
            logger.warning(
                "dask-memusage: tasks overlap in a worker's process, and max_memory_mb of those is "
                "of them all together. Run one thread a worker, or turn jemalloc on "
                "(memusage.jemalloc), and see growth_bytes and scope (memusage.csv.columns: full)"
            )

    def _flush(self) -> None:
        self._flush_waits = False
        with self.health.guard("csv"):
            for sink in self.sinks:
                sink.flush()

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
            exemplars=self.exemplars if own_page else None,
        )

    def _killed(self) -> dict[str, prometheus.KilledSnapshot]:
        self.kills.learn(list(self.scheduler.task_prefixes))
        return self.kills.snapshot()

    def _workers(self) -> tuple[dict[str, int], list[int], list[float]]:
        """Return workers by source, their memory limits, and when each was last heard of."""
        workers = dict.fromkeys(catalog.SOURCES, 0)
        limits: list[int] = []
        reports: list[float] = []
        # In one step: another cluster of this process may ask, from its own event loop.
        for state in list(dict.values(self.scheduler.workers)):
            said = state.metrics.get(EXTENSION)
            # A worker that has just joined has said hello, and its heartbeat is on its way.
            source = said.get("source") if isinstance(said, dict) else None
            source = source or self.deaths.source_of(state.address)
            workers[source if source in workers else "missing"] += 1
            if state.memory_limit:
                limits.append(state.memory_limit)
            if source in workers and source != "missing":
                reports.append(state.last_seen)
        return workers, limits, reports

    def observe(self, name: str) -> Iterable[tuple[tuple[str, ...], float | None]]:
        """Return the values of a metric that OpenTelemetry observes; from any thread."""
        from dask_memusage_exporter.exporters import otlp

        return otlp.scheduler_values(
            name,
            health=self.health,
            workers_by_source=lambda: self._workers()[0],
            killed=self._killed,
        )

    def collect_health(self, *, own_page: bool = False) -> Iterable[Metric]:  # noqa: ARG002  # the same
        """Return those that tell of the exporter itself."""
        return prometheus.health_families(
            namespace=prometheus_namespace(), server="scheduler", health=self.health, info={}
        )

    async def send_last(self) -> None:
        """Send by OpenTelemetry what is left."""
        began = time.perf_counter()
        await self._telemetry.end(self._settings.shutdown_timeout)
        logger.info("dask-memusage: closed in %.2f s", time.perf_counter() - began)

    def teardown(self) -> None:
        """Let everything go; ``Scheduler.close`` calls this on all extensions."""
        self._telemetry.close()
        self._telemetry.unbind()
        prometheus.remove(self)
        self.deaths.close()
        self._recordings.clear()
        while self.sinks:
            self.sinks.pop().close()


class _Events(SchedulerPlugin):
    """Hears the scheduler's events: workers and clients that go, and the nannies' memory kills."""

    name = f"{EXTENSION}-events"

    def __init__(self, agent: SchedulerAgent) -> None:
        self._agent = agent

    async def before_close(self) -> None:
        await self._agent.send_last()

    def log_event(self, topic: str, msg: Any) -> None:
        self._agent.deaths.event(topic, msg)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:  # noqa: ARG002  # Dask's signature
        self._agent.forget_client(client)


class MemusageSchedulerPlugin(SchedulerPlugin):
    """Measures all tasks of a cluster: ``client.register_plugin(MemusageSchedulerPlugin())``.

    It puts what is needed on every worker itself. Registering it again is harmless, and may add a
    CSV. ``client.unregister_worker_plugin("memusage")`` stops measuring.

    Parameters
    ----------
    csv_path
        A file on the scheduler's machine, overwritten if it is there; None: the setting
        ``memusage.csv.path``, which may be none.
    jemalloc
        See :func:`install.install`.
    """

    name = EXTENSION

    def __init__(
        self,
        csv_path: str | os.PathLike[str] | None = None,
        jemalloc: bool | str | None = None,
    ) -> None:
        self.csv_path = csv_path
        self.jemalloc = jemalloc

    async def start(self, scheduler: Scheduler) -> None:
        """Begin, or add to what is there.

        Raises
        ------
        ConfigError
            A setting of the scheduler is wrong.
        OSError
            The CSV file cannot be written.
        """
        agent = prepare(scheduler, self.csv_path)
        # Registered again: the state is kept, only the plugin object is replaced.
        scheduler.plugins.pop(self.name, None)
        await agent.begin(self.jemalloc)


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
    agent = known if isinstance(known, SchedulerAgent) else SchedulerAgent(scheduler, settings)
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
        await agent.begin()


def _checked_rises(health: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what a worker's own counters have risen by; raises where one of them is no rise."""
    rises = {name: dict(health.get(name, {})) for name in ("errors", "seconds", "dropped")}
    for name, counts in rises.items():
        for key, rise in counts.items():
            if type(rise) not in (int, float) or not 0 <= rise < 2**63:
                raise ValueError(f"not a rise of a worker's {name}: {key!r:.99} by {rise!r:.99}")
    return rises
