"""Our own health: errors, time spent and records lost, counted where they happen.

Every call of ours that stands in a user's way goes through :meth:`Health.guard`, so that an error
of ours is counted, logged once a stage, and never reaches the task.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

#: Values of the label ``stage``.
STAGES = ("start", "stop", "record", "send", "aggregate", "render", "csv", "export")

#: Values of the label ``reason`` of dropped records.
DROP_REASONS = (
    "disconnected",
    "queue_full",
    "csv_write",
    "span_export",
    "worker_gone",
    "invalid",
)


class Health:
    """Counters of one process or scheduler. All start at 0, so that a first rise is seen.

    Parameters
    ----------
    server
        ``worker`` or ``scheduler``: in whose log errors are to be read.
    """

    def __init__(self, server: str = "worker") -> None:
        # Dask shows what is logged below its servers' own loggers, on screen and in
        # Client.get_worker_logs, and nothing of other names below warnings.
        self.logger = logging.getLogger(f"distributed.{server}.memusage")
        self._lock = threading.RLock()  # a finalizer may come in between, see Tracker
        self.errors = dict.fromkeys(STAGES, 0)
        #: Seconds spent.
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.dropped = dict.fromkeys(DROP_REASONS, 0)
        #: What of them other processes have told.
        self._others: dict[str, dict[str, float]] = {}
        self._logged: set[tuple[str, str]] = set()
        self._told: dict[str, dict[str, float]] = {}

    def guard(self, stage: str) -> _Guard:
        """Return a context that times its body and swallows, counts and logs its errors."""
        return _Guard(self, stage)

    def error(self, stage: str, error: Exception) -> None:
        """Count an error; log the first of its kind in a stage."""
        kind = (stage, type(error).__name__)
        with self._lock:
            self.errors[stage] += 1
            first = kind not in self._logged
            self._logged.add(kind)
        if first:
            self.logger.warning(
                "dask-memusage: %s failed (%s: %s); tasks are not affected, further errors of this "
                "kind are only counted",
                stage,
                type(error).__name__,
                error,
                exc_info=self.logger.isEnabledFor(logging.DEBUG),
            )

    def rises(self) -> dict[str, dict[str, float]]:
        """Return what has risen since the last call, by counter; empty where nothing has."""
        rises: dict[str, dict[str, float]] = {}
        with self._lock:
            for name in ("errors", "seconds", "dropped"):
                counts: dict[str, float] = getattr(self, name)
                told = self._told.setdefault(name, {})
                risen = {k: v - told.get(k, 0) for k, v in counts.items() if v > told.get(k, 0)}
                told.update({k: counts[k] for k in risen})
                if risen:
                    rises[name] = risen
        return rises

    def add(self, rises: Mapping[str, Mapping[str, float]]) -> None:
        """Add what another process's counters have risen by; unknown names are left out."""
        with self._lock:
            for name in ("errors", "seconds", "dropped"):
                counts: dict[str, Any] = getattr(self, name)
                others = self._others.setdefault(name, {})
                for key, rise in rises.get(name, {}).items():
                    if key in counts:
                        counts[key] += rise
                        others[key] = others.get(key, 0) + rise

    def own(self, name: str) -> dict[str, float]:
        """Return a counter (``errors``, ``seconds`` or ``dropped``) without other processes'."""
        with self._lock:
            counts: dict[str, float] = getattr(self, name)
            others = self._others.get(name, {})
            return {key: count - others.get(key, 0) for key, count in counts.items()}

    def drop(self, reason: str, count: int = 1) -> None:
        """Count records that are lost."""
        with self._lock:
            self.dropped[reason] += count

    def spent(self, stage: str, seconds: float) -> None:
        """Add to the time spent."""
        with self._lock:
            self.seconds[stage] += seconds


class _Guard:
    # A class and not a generator: this is entered once a task.
    __slots__ = ("_began", "_health", "_stage")

    def __init__(self, health: Health, stage: str) -> None:
        self._health, self._stage = health, stage

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        self._health.spent(self._stage, time.perf_counter() - self._began)
        if isinstance(error, Exception):
            self._health.error(self._stage, error)
            return True
        return False
