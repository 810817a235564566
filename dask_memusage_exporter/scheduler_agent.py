"""The scheduler's agent: has all workers measure, and what they report goes where it belongs.

Counts go by ``batches`` into the cluster's ``aggregate``, single records by ``rows`` to the sinks,
workers that come and go are told to ``deaths``, and the tasks that died with them to ``kills``;
``cluster_metrics`` shows it all.

Covers: how these are put together; the bootstrap on workers that are there and that come later.
Does not cover: who makes an agent, and when (``scheduler``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps
from tornado.ioloop import PeriodicCallback

from dask_memusage_exporter import __version__, http, providers
from dask_memusage_exporter.aggregate import Aggregate
from dask_memusage_exporter.batches import Batches
from dask_memusage_exporter.bootstrap import ByValue
from dask_memusage_exporter.cluster_metrics import ClusterMetrics
from dask_memusage_exporter.config import Settings, explicit
from dask_memusage_exporter.deaths import Deaths
from dask_memusage_exporter.exemplars import Exemplars
from dask_memusage_exporter.exporters import RecordSink, prometheus
from dask_memusage_exporter.exporters.recordings import START_OP, STOP_OP, Recordings
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.kills import Kill, Kills, describe, to_record
from dask_memusage_exporter.nannies import Nannies
from dask_memusage_exporter.reporter import BATCH_OP, GOODBYE_OP, HELLO_OP, LEAVING_OP, RECORDS_OP
from dask_memusage_exporter.rows import Rows
from dask_memusage_exporter.telemetry import Telemetry
from dask_memusage_exporter.worker import EXTENSION

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("distributed.scheduler.memusage")

#: Seconds between looks whose OpenTelemetry providers there are.
_FOLLOW = 1.0


class SchedulerAgent:
    """One scheduler's measurement. Made by :func:`scheduler.prepare`."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler = scheduler
        self.health = Health("scheduler")
        self._settings = settings
        self.aggregate = Aggregate(
            bounds=settings.buckets,
            max_prefixes=settings.max_prefixes,
            maximum_window=settings.maximum_window,
            wanted=settings.wants,
        )
        exemplars = Exemplars(settings.buckets, settings.max_prefixes + 1)
        self.batches = Batches(
            scheduler.loop, aggregate=self.aggregate, exemplars=exemplars, health=self.health
        )
        self.kills = Kills(self.aggregate)
        self.deaths = Deaths(
            scheduler,
            on_kill=self._on_kill,
            on_end=self.batches.end,
            on_error=lambda error: self.health.error("record", error),
        )
        source_of = self.deaths.source_of
        self.nannies = Nannies(scheduler, source_of=source_of)
        self.rows = Rows(scheduler.loop, health=self.health, source_of=source_of)
        self.recordings = Recordings(scheduler, rows=self.rows, deaths=self.deaths, push=self.push)
        self.metrics = ClusterMetrics(
            scheduler,
            aggregate=self.aggregate,
            exemplars=exemplars,
            kills=self.kills,
            health=self.health,
            source_of=source_of,
        )

    def start(self) -> None:
        """Take the scheduler over."""
        scheduler = self.scheduler
        scheduler.extensions[EXTENSION] = self
        # For the scheduler's life: an operation that it does not know closes a worker's stream.
        scheduler.stream_handlers[RECORDS_OP] = self.rows.take
        scheduler.stream_handlers[BATCH_OP] = self.handle_batch
        scheduler.stream_handlers[HELLO_OP] = self.handle_hello
        scheduler.stream_handlers[GOODBYE_OP] = self.handle_goodbye
        scheduler.handlers[LEAVING_OP] = self.handle_leaving
        scheduler.handlers[START_OP] = self.recordings.start
        scheduler.handlers[STOP_OP] = self.recordings.stop
        scheduler.add_plugin(_Events(self), name=_Events.name)
        with self.health.guard("render"):
            http.add_routes(scheduler)
            http.add_metrics(scheduler, lambda: self.metrics)
        prometheus.add(self.metrics)
        identity = providers.identity("scheduler", id=scheduler.id)
        self._telemetry = Telemetry(self.metrics, identity, self._settings)
        # An application may set its providers while the cluster is idle. A scheduler that starts
        # starts this too, and one that ends stops it.
        follow = PeriodicCallback(self._telemetry.refresh, _FOLLOW * 1000)
        scheduler.periodic_callbacks[EXTENSION] = follow
        scheduler.loop.add_callback(self._start_following)
        logger.info("dask-memusage %s: measuring this scheduler's cluster", __version__)

    def _start_following(self) -> None:
        follow = self.scheduler.periodic_callbacks.get(EXTENSION)
        if follow is not None and not follow.is_running():
            follow.start()

    def add_sink(self, sink: RecordSink) -> None:
        """Give every record to a sink from now on. :meth:`push` tells the workers."""
        self.rows.sinks.append(sink)

    async def begin(self, jemalloc: bool | str | None = None) -> None:
        """Measure: jemalloc on the nannies first, where it is wanted, for it starts workers anew.

        Parameters
        ----------
        jemalloc
            See :func:`install.install`; None: as the setting says.
        """
        wanted = self._settings.jemalloc if jemalloc is None else jemalloc
        if wanted:
            await self.nannies.turn_jemalloc_on(None if wanted is True else wanted)
        await self.push()
        for worker in self.scheduler.workers:
            self.nannies.heed(worker)

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
            "rows": bool(self.rows.sinks),
        }

    def handle_batch(self, **message: Any) -> None:
        """Add a worker's counts to the cluster's, see :meth:`Batches.take`."""
        self._telemetry.refresh()
        self.batches.take(**message)

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
            self.nannies.heed(worker)
            self.batches.take_health(health)

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
            self.batches.take_health(health)

    async def handle_leaving(
        self, worker: str = "", batches: Iterable[Mapping[str, Any]] = (), **parting: Any
    ) -> None:
        """Hear the same by a connection of its own: where the stream is broken, or of a nanny."""
        with self.health.guard("aggregate"):
            for batch in batches:
                self.handle_batch(worker=worker, **batch)
        parting.pop("comm", None)
        self.handle_goodbye(worker=worker, **parting)

    def _on_kill(self, kill: Kill) -> None:
        self.kills.count(kill)
        line = describe(kill)
        logger.warning("dask-memusage: %s", line)
        self.rows.show(to_record(kill))
        self.scheduler.log_event(
            EXTENSION, {"action": "killed", "message": line, **kill._asdict(), "key": str(kill.key)}
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
        prometheus.remove(self.metrics)
        self.deaths.close()
        self.recordings.clear()
        self.rows.close()


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
        self._agent.recordings.forget_client(client)
