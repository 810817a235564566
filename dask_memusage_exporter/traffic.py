"""What a worker itself moves through the process's memory: bytes that no task owns.

Covers: transfers in and out, results that arrive by scatter, spilling and unspilling, results that
are released, the buffers of P2P shuffles.
Does not cover: large arguments inside a graph, as they are deserialised; above 10 MB that happens
on the offload thread, whose processor time is a witness for the tracker.

Counters are plain attributes of the worker, read from the task's thread without a lock: a number
that is one message old moves a bound by one message.
"""

from __future__ import annotations

import threading
from typing import Any

#: Keys of ``SpillBuffer.cumulative_metrics``.
_WRITTEN, _READ = ("disk-write", "bytes"), ("disk-read", "bytes")


class Traffic:
    """Bytes moved by one worker.

    The difference between :meth:`closing` at a task's stop and :meth:`opening` at its start is
    all that was moved meanwhile, what was under way at either end included.
    """

    def __init__(self, worker: Any) -> None:
        # The objects behind these stay the same for the worker's life; this is the hot path.
        self._worker = worker
        self._state = worker.state
        self._data = worker.data
        self._spills = getattr(worker.data, "cumulative_metrics", {})
        #: Arrived (transfers, scatter) and released, added up by the worker's transitions.
        self.arrived = 0
        self.released = 0
        self._lock = threading.Lock()
        self._shuffles: dict[Any, int] = {}
        self._ended_shuffles = 0

    def opening(self) -> int:
        """Return bytes moved so far, less those that are on their way out."""
        return self._moved(self._runs()) - int(self._worker.transfer_outgoing_bytes)

    def closing(self) -> int:
        """Return bytes moved so far and those that are on their way in or wait in buffers."""
        runs = self._runs()
        moved = self._moved(runs) + int(self._state.transfer_incoming_bytes)
        for beat in runs.values():
            moved += beat["comm"]["memory"] + beat["disk"]["memory"]
        return moved

    def _moved(self, runs: dict[Any, Any]) -> int:
        moved = self.arrived + self.released + int(self._worker.transfer_outgoing_bytes_total)
        if _WRITTEN in self._spills:
            # Files may be compressed; the size in memory of what is on disk is not.
            moved += int(self._spills[_WRITTEN] + self._spills.get(_READ, 0))
            moved += self._data.spilled_total.memory
        if runs or self._shuffles:
            self._count_shuffles(runs)
        return moved + self._ended_shuffles + sum(self._shuffles.values())

    def _count_shuffles(self, runs: dict[Any, Any]) -> None:
        now = {
            name: sum(beat[part][field] for part in ("comm", "disk") for field in ("total", "read"))
            for name, beat in runs.items()
        }
        with self._lock:
            for name in self._shuffles.keys() - now.keys():
                self._ended_shuffles += self._shuffles[name]
            self._shuffles = now

    def _runs(self) -> dict[Any, Any]:
        shuffle = self._worker.extensions.get("shuffle")
        return {} if shuffle is None else shuffle.heartbeat()
