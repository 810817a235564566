"""What exists once a process: tracker, aggregate, health, and our place on ``/metrics``.

Several Workers may live in one process (``LocalCluster(processes=False)``). The process has one
high-water mark, one heap and one Prometheus registry, so all of them share this. The first worker
brings it up, with its settings; the last takes it down, and its series go.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from typing import Protocol

from prometheus_client import Metric

from dask_memusage_exporter import __version__
from dask_memusage_exporter.aggregate import Aggregate
from dask_memusage_exporter.config import Settings, prometheus_namespace
from dask_memusage_exporter.exporters import prometheus
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.measure import choose, threads
from dask_memusage_exporter.measure.heap import Heap
from dask_memusage_exporter.measure.tracker import Look, Tracker
from dask_memusage_exporter.traffic import Traffic

logger = logging.getLogger(__name__)


class Member(Protocol):
    """A worker of this process."""

    traffic: Traffic

    def memory_limit(self) -> int | None:
        """Return the worker's memory limit in bytes; None where there is none."""


class Process:
    """One process's measurement. Get it by :func:`join`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.pid = os.getpid()
        self.health = Health()
        source, why = choose(settings.source, kernel_reset=settings.kernel_reset)
        self.source_name = source.name
        heap = Heap(settings.trim)
        self.tracker = Tracker(source, heap)
        main = threading.main_thread()
        if main is not threading.current_thread():
            # The event loop, which calls this, is not the main thread: user code may run there.
            self.tracker.add_witness(threads.clock_of(main.ident), "code")
        self.tracker.add_house(threads.clock_of(threading.get_ident()))
        self.aggregate = Aggregate(
            bounds=settings.buckets,
            max_prefixes=settings.max_prefixes,
            maximum_window=settings.maximum_window,
        )
        self.members: list[Member] = []
        logger.info("dask-memusage %s: source %s; %s", __version__, source.name, why)
        if heap.unknown is not None:
            logger.info("dask-memusage: the heap cannot be asked (%s)", heap.unknown)
        prometheus.add(self)

    def look_before(self) -> Look:
        """Read what surrounds a task of this process before it starts, on the event loop."""
        moved = 0
        for member in self.members:
            moved += member.traffic.opening()
        return self.tracker.look(moved)

    def look_after(self) -> Look:
        """Read the same after it has ended."""
        moved = 0
        for member in self.members:
            moved += member.traffic.closing()
        return self.tracker.look(moved)

    def collect(self) -> Iterable[Metric]:
        """Return the worker's metric families; see ``catalog``."""
        limits = [limit for member in self.members if (limit := member.memory_limit())]
        return prometheus.worker_families(
            namespace=prometheus_namespace(),
            mode=self.settings.worker_metrics,
            aggregate=self.aggregate,
            health=self.health,
            source=self.source_name,
            memory_limit=min(limits, default=None),
        )

    def close(self) -> None:
        """Take everything down."""
        prometheus.remove(self)
        self.tracker.close()


_lock = threading.Lock()
_process: Process | None = None


def join(member: Member, settings: Settings) -> Process:
    """Return this process's measurement with a worker added to it."""
    global _process
    with _lock:
        # A forked child inherits its parent's, which measures nothing there.
        if _process is None or _process.pid != os.getpid():
            _process = Process(settings)
        elif _process.settings != settings:
            logger.warning(
                "dask-memusage: another worker of this process has set up measuring with other "
                "settings; they hold for this one too: %s",
                _process.settings,
            )
        if member not in _process.members:
            _process.members.append(member)
        return _process


def leave(member: Member) -> None:
    """Take a worker off; the last one takes the process's measurement down."""
    global _process
    with _lock:
        if _process is None or member not in _process.members:
            return
        _process.members.remove(member)
        if not _process.members:
            _process.close()
            _process = None
