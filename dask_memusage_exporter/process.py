"""What exists once a process: tracker, aggregate, health, and our place on ``/metrics``.

Several Workers may live in one process (``LocalCluster(processes=False)``). The process has one
high-water mark, one heap and one Prometheus registry, so all of them share this. The first worker
brings it up, with its settings; when the last one closes it is taken down, and its series go.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter, time
from typing import Protocol

from prometheus_client import Metric

from dask_memusage_exporter import __version__, providers
from dask_memusage_exporter.aggregate import Aggregate
from dask_memusage_exporter.config import Settings, prometheus_namespace
from dask_memusage_exporter.exemplars import Exemplars
from dask_memusage_exporter.exporters import prometheus
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.measure import choose, threads
from dask_memusage_exporter.measure.bracket import Bracket, Look, Window
from dask_memusage_exporter.measure.heap import Heap
from dask_memusage_exporter.measure.tracker import Tracker
from dask_memusage_exporter.telemetry import Telemetry
from dask_memusage_exporter.traffic import Traffic

logger = logging.getLogger("distributed.worker.memusage")

#: Seconds for which a look at what surrounds the shortest tasks holds, if nothing happens.
_MOMENT = 0.1


class Member(Protocol):
    """A worker of this process."""

    traffic: Traffic

    def memory_limit(self) -> int | None:
        """Return the worker's memory limit in bytes; None where there is none."""

    @property
    def heard(self) -> bool:
        """Whether the scheduler shows everything for the whole cluster."""

    def identity(self) -> Mapping[str, str]:
        """Return what identifies the worker: attributes of OpenTelemetry's."""

    def measured_by(self, measuring: Process) -> None:
        """Hear whose part this worker is from now on."""

    def flush(self) -> None:
        """Add what has been counted to the aggregate."""

    def note(self, open_brackets: Iterable[Bracket]) -> None:
        """Note how high tasks are; from the sampler's thread, every 10 ms while one runs."""


class Process:
    """One process's measurement. Get it by :func:`join`, which tells the worker.

    Parameters
    ----------
    identity
        What identifies the process: the first worker's attributes.
    """

    #: Whose metrics are observed here; see :class:`otlp.Source`.
    server = "worker"

    def __init__(self, settings: Settings, identity: Mapping[str, str]) -> None:
        self.settings = settings
        #: Whether a task has been measured: until then other settings may still take over.
        self.used = False
        self.pid = os.getpid()
        self.health = Health()
        chosen = choose(settings.source, kernel_reset=settings.kernel_reset)
        self.source_name, self.why = chosen.name, chosen.why
        self.heap = Heap(settings.trim)
        self.tracker = Tracker(chosen.source, self.heap, chosen.thread_peak, on_look=self._note)
        main = threading.main_thread()
        if main is not threading.current_thread():
            # The event loop, which calls this, is not the main thread: user code may run there.
            self.tracker.add_witness(threads.clock_of(main.ident), "code")
        self.tracker.add_house(threads.clock_of(threading.get_ident()))
        self.aggregate = Aggregate(
            bounds=settings.buckets,
            max_prefixes=settings.max_prefixes,
            maximum_window=settings.maximum_window,
            wanted=settings.wants,
        )
        self.exemplars = Exemplars(settings.buckets, settings.max_prefixes + 1)
        self.members: list[Member] = []
        #: When what we show was last read, in seconds since the epoch; None: never.
        self.scraped: float | None = None
        #: The last look before a task, and when that was (seconds, monotonic).
        self._before: tuple[Look, int] | None = None
        self._looked = 0.0
        logger.info("dask-memusage %s: source %s; %s", __version__, chosen.name, chosen.why)
        if self.heap.unknown is not None:
            logger.info("dask-memusage: the heap cannot be asked (%s)", self.heap.unknown)
        prometheus.add(self)
        self.telemetry = Telemetry(self, identity, settings)

    def _note(self, open_brackets: Iterable[Bracket]) -> None:
        for member in self.members:
            member.note(open_brackets)

    def look_before(self, *, short: bool) -> tuple[Look, int]:
        """Look before a task, on the event loop: and at what all workers here have moved.

        ``short`` is whether tasks of its kind are so short, and take so little, that what surrounds
        them hardly matters. Then the heap is not asked, and the last look will do if all windows
        since have been uneventful: what has moved meanwhile counts as foreign.
        """
        now = perf_counter()
        if short and self._before is not None and now - self._looked < _MOMENT:
            self.heap.ready = False
            return self._before
        if not self.used:
            self.used = True
            self.telemetry.refresh()  # so that no record is too early for it
        moved = 0
        for member in self.members:
            moved += member.traffic.opening()
        self.heap.save(worth=not short)
        before = self._before = self.tracker.look(), moved
        self._looked = now
        return before

    def settle(self, bracket: Bracket, before: tuple[Look, int]) -> Window:
        """Return what was measured; see :meth:`Tracker.settle`."""
        look, moved = before
        if not bracket.uneventful:
            self._before = None
            bracket.foreign += moved
            for member in self.members:
                bracket.foreign_after += member.traffic.closing(quick=bracket.quiet)
        return self.tracker.settle(bracket, look)

    def open(self, thread: int | None, alive: Callable[[], bool]) -> Bracket | None:
        """Open a bracket, see :meth:`Tracker.start`, and note what the workers have stored."""
        bracket = self.tracker.start(thread, alive)
        if bracket is not None:
            for member in self.members:
                bracket.foreign += member.traffic.stored()
        return bracket

    def shut(self, bracket: Bracket) -> bool:
        """Close it, see :meth:`Tracker.stop`, and note the same."""
        closed = self.tracker.stop(bracket)
        if closed:
            for member in self.members:
                bracket.foreign_after += member.traffic.stored()
        return closed

    def spent(self, bracket: Bracket) -> None:
        """Count what a bracket has cost its thread."""
        self.health.spent("start", bracket.start_seconds)
        self.health.spent("stop", bracket.stop_seconds)

    def collect(self, *, own_page: bool = False) -> Iterable[Metric]:
        """Return the worker's metric families; see ``catalog``."""
        self.scraped = time()
        for member in self.members:
            member.flush()
        mode = "full" if own_page else self.settings.worker_metrics
        if mode == "auto":
            mode = "totals" if all(member.heard for member in self.members) else "full"
        return prometheus.worker_families(
            namespace=prometheus_namespace(),
            mode=mode,
            aggregate=self.aggregate,
            memory_limit=self._memory_limit(),
            exemplars=self.exemplars if own_page else None,
        )

    def _memory_limit(self) -> int | None:
        limits = [limit for member in list(self.members) if (limit := member.memory_limit())]
        return min(limits, default=None)

    def observe(self, name: str) -> Iterable[tuple[tuple[str, ...], float | None]]:
        """Return the values of a metric that OpenTelemetry observes; from any thread."""
        from dask_memusage_exporter.exporters import otlp

        return otlp.worker_values(
            name,
            aggregate=self.aggregate,
            health=self.health,
            memory_limit=self._memory_limit(),
        )

    def collect_health(self, *, own_page: bool = False) -> Iterable[Metric]:
        """Return those that tell of the exporter itself."""
        if self.settings.worker_metrics == "off" and not own_page:
            return ()
        return prometheus.health_families(
            namespace=prometheus_namespace(),
            server="worker",
            health=self.health,
            info={"source": self.source_name},
        )

    def close(self) -> None:
        """Take everything down."""
        prometheus.remove(self)
        self.telemetry.close()
        self.telemetry.unbind()
        self.tracker.close()


_lock = threading.Lock()
_process: Process | None = None


def join(member: Member, settings: Settings) -> None:
    """Measure a worker as part of its process, and tell it so.

    Settings that differ from the process's take over if no task has been measured yet: those of a
    worker's preload stand until the scheduler's arrive.
    """
    global _process
    with _lock:
        # A forked child inherits its parent's, which measures nothing there.
        here = _process if _process is not None and _process.pid == os.getpid() else None
        members = [] if here is None else here.members
        instance = {}
        if here is not None and here.settings != settings:
            if here.used:
                logger.warning(
                    "dask-memusage: other settings than before; they hold once all workers of this "
                    "process have been restarted. Until then: %s",
                    here.settings,
                )
            else:
                here.close()
                # The process is the same one, for whoever has heard of it already.
                instance = {providers.INSTANCE: here.telemetry.instance}
                here = None
        if member not in members:
            members = [*members, member]
        told = [member]
        if here is None:
            here = _process = Process(settings, {**member.identity(), **instance})
            told = members
        here.members = members
        for one in told:
            one.measured_by(here)


def here() -> Process | None:
    """Return this process's measurement; None where no worker is measured."""
    return _process


async def send_last(member: Member) -> None:
    """Send by OpenTelemetry what is left, where the last worker closes; :func:`leave` follows."""
    here = _process
    if here is not None and here.members == [member]:
        await here.telemetry.end(here.settings.shutdown_timeout)


def leave(member: Member) -> None:
    """Take a worker off that closes; the last one takes the process's measurement down."""
    global _process
    with _lock:
        if _process is None or member not in _process.members:
            return
        _process.members.remove(member)
        if not _process.members:
            _process.close()
            _process = None
