"""The worker's side: what measures a worker is put together here, comes and goes.

The way of a task: Dask calls the ``hooks``, which open and close its bracket; ``executions`` makes
the record of it, and the ``reporter`` tells the scheduler. ``worker_spans`` has its span meanwhile.

Covers: beginning, going on with other options, stopping and closing; what the heartbeat tells; the
worker's part in what its process shares.
Does not cover: tasks that were running before us, and tasks that fail before they start (an
unknown executor, inputs that cannot be read back): nothing of theirs ran.

The state lives in ``worker.extensions["memusage"]`` and not in the plugin: ``Worker.plugin_add``
tears a plugin of the same name down and replaces it, and running tasks must keep their start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dask_memusage_exporter import http, process, providers, seam
from dask_memusage_exporter.bootstrap import Bootstrap, ByValue
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.executions import Executions
from dask_memusage_exporter.hooks import Hooks
from dask_memusage_exporter.measure import threads
from dask_memusage_exporter.measure.bracket import Bracket
from dask_memusage_exporter.reporter import Reporter
from dask_memusage_exporter.traffic import Traffic
from dask_memusage_exporter.worker_spans import WorkerSpans

if TYPE_CHECKING:
    from distributed import Worker

logger = logging.getLogger("distributed.worker.memusage")

EXTENSION = "memusage"

#: Seconds for all that we do when a worker closes; 2 are promised, and a busy machine needs some.
_CLOSING = 1.8


class WorkerAgent:
    """Measures the tasks of one worker. Made by :func:`attach`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.traffic = Traffic(worker)
        #: Tells the scheduler; see :class:`reporter.Reporter`.
        self.reporter = Reporter(worker)
        self.spans = WorkerSpans(worker)
        self.executions = Executions(
            worker, traffic=self.traffic, reporter=self.reporter, spans=self.spans
        )
        self.hooks = Hooks(
            worker,
            traffic=self.traffic,
            reporter=self.reporter,
            spans=self.spans,
            executions=self.executions,
        )
        #: What the plugin has in place of its own.
        self.transition = self.hooks.transition
        #: Whether a plugin stands for us on the worker.
        self._owned = False
        #: Whether our metrics have their page on the worker's HTTP server, which stays.
        self._has_page = False
        fault = seam.install(worker, self.hooks)
        if fault is not None:
            self.executions.do_without_threads(fault)
        seam.listen_on_loop(worker, self.hooks.on_loop, self.hooks.on_actor_error)

    @property
    def measuring(self) -> process.Process | None:
        """Whose part the worker is; None: nothing is measured."""
        return self.hooks.measuring

    # -- coming and going ----------------------------------------------------------------

    def activate(self, options: Mapping[str, Any]) -> None:
        """Begin to measure, or go on with other options.

        Parameters
        ----------
        options
            What the scheduler has said, by the bootstrap: ``settings`` (its explicit settings),
            ``listens`` (its id, if it takes what the reporter sends) and ``rows`` (whether it wants
            single records too). Unknown ones are ignored: its version may be newer than ours.

        Raises
        ------
        ConfigError
            A setting is wrong.
        """
        first = self.measuring is None
        settings = (
            Settings.load(options.get("settings")) if first or "settings" in options else None
        )
        self._owned = True
        if settings is not None:
            process.join(self, settings)
        if self.measuring is not None:
            self.reporter.listen(options, self.measuring)
            if not self._has_page:
                self._has_page = True
                with self.measuring.health.guard("render"):
                    http.add_metrics(self.worker, process.here)
        self.worker.metrics[EXTENSION] = self._heartbeat

    async def introduction(self) -> None:
        """Wait until the scheduler will hear of this worker, whatever its first task does."""
        await self.reporter.introduction()

    def deactivate(self) -> None:
        """Stop measuring until activated again. What runs goes on unmeasured; counters stand."""
        measuring, self.hooks.measuring = self.measuring, None
        if measuring is not None:
            self.executions.give_up(measuring)
            self.reporter.end_all()
            self.spans.give_up_calls()

    def release(self) -> None:
        """Stop measuring unless somebody activates again before the event loop's next round.

        ``Worker.plugin_add`` tears the old plugin down and sets the new one up in one round.
        """
        self._owned = False
        self.worker.loop.add_callback(lambda: None if self._owned else self.deactivate())

    async def close(self) -> None:
        """Let everything go; ``Worker.close`` calls this on all extensions."""
        began = perf_counter()
        self.deactivate()
        self.reporter.flush()
        # Before the goodbye, which tells the scheduler what was lost in it.
        await process.send_last(self)
        await self.reporter.goodbye(began + _CLOSING - perf_counter())
        process.leave(self)
        logger.info("dask-memusage: closed in %.2f s", perf_counter() - began)

    def _heartbeat(self, _: Worker) -> dict[str, Any]:
        from dask_memusage_exporter import __version__

        measuring = self.measuring
        if measuring is not None:
            measuring.telemetry.refresh()
        running = [*self.hooks.on_threads(), *self.executions.without_thread.values()]
        return {
            "source": measuring.source_name if measuring is not None else "missing",
            "version": __version__,
            "running": self.reporter.running(running),
        }

    def _watch_offload(self) -> None:
        """Take the clock of the thread on which distributed (de)serialises large messages."""
        measuring = self.measuring
        offload = self.worker.executors.get("offload")
        if measuring is not None and isinstance(offload, Executor):
            offload.submit(get_ident).add_done_callback(
                lambda done: measuring.tracker.add_witness(
                    threads.clock_of(done.result()), "offload"
                )
            )

    # -- process.Member ------------------------------------------------------------------

    def measured_by(self, measuring: process.Process) -> None:
        """Hear whose part this worker is from now on."""
        if self._owned:
            self.hooks.measuring = measuring
            self._watch_offload()

    def identity(self) -> dict[str, str]:
        """Return what identifies the worker: attributes of OpenTelemetry's."""
        try:
            address = self.worker.address
        except ValueError:  # it does not listen yet
            address = ""
        if address.startswith("inproc:"):
            return providers.identity("worker")  # one of several in its process, for all we know
        return providers.identity("worker", name=str(self.worker.name), address=address)

    def memory_limit(self) -> int | None:
        """Return the worker's memory limit in bytes, or None."""
        return self.worker.memory_manager.memory_limit

    @property
    def why(self) -> str | None:
        """Why peaks come from where they do, for people; None while nothing is measured."""
        return None if self.measuring is None else self.measuring.why

    @property
    def scraped(self) -> float | None:
        """When ``/metrics`` of this process was last read, in seconds since the epoch."""
        return None if self.measuring is None else self.measuring.scraped

    @property
    def heard(self) -> bool:
        """Whether the scheduler shows everything for the whole cluster."""
        return self.reporter.heard

    def flush(self) -> None:
        """Add what has been counted to the process's aggregate, and tell the scheduler."""
        self.reporter.flush()

    def note(self, open_brackets: Iterable[Bracket]) -> None:
        """Note in the flight file how high tasks are."""
        self.reporter.note(open_brackets)


def attach(worker: Worker, options: Mapping[str, Any]) -> WorkerAgent:
    """Begin to measure on a worker, or adopt what measures there already."""
    agent = worker.extensions.get(EXTENSION)
    if not isinstance(agent, WorkerAgent):
        agent = worker.extensions[EXTENSION] = WorkerAgent(worker)
    agent.activate(options)
    return agent


class MemusageWorkerPlugin(Bootstrap):
    """Measures the tasks of a worker: ``client.register_plugin(MemusageWorkerPlugin())``.

    Where the scheduler's plugin is registered too this one is not needed, and does nothing. It
    travels by value: a worker without the package joins, and runs unmeasured.
    """

    #: What is registered under this name stays: it may be the scheduler's, which knows more.
    idempotent = True

    def __init__(self) -> None:
        super().__init__({})

    def __reduce__(self) -> Any:
        return ByValue(self.options).__reduce__()
