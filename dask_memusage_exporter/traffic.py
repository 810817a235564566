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


class Traffic:
    """Bytes moved by one worker.

    The difference of :meth:`closing` at a task's stop and :meth:`opening` at its start is all that
    was moved in between, what was under way at either end included.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        #: Arrived (transfers, scatter) and released, added up by the worker's transitions.
        self.arrived = 0
        self.released = 0
        self._lock = threading.Lock()
        self._shuffles: dict[Any, int] = {}
        self._ended_shuffles = 0

    def opening(self) -> int:
        """Return bytes moved so far, less those that are on their way out."""
        return self._moved() - int(self._worker.transfer_outgoing_bytes)

    def closing(self) -> int:
        """Return bytes moved so far and those that are on their way in or wait in buffers."""
        return self._moved() + int(self._worker.state.transfer_incoming_bytes) + self._buffered()

    def _moved(self) -> int:
        worker = self._worker
        return (
            self.arrived
            + self.released
            + int(worker.transfer_outgoing_bytes_total)
            + _spilled(worker.data)
            + self._shuffled()
        )

    def _shuffled(self) -> int:
        runs = self._runs()
        if not runs and not self._shuffles:
            return self._ended_shuffles
        with self._lock:
            now = {
                name: sum(beat[part][field] for part in ("comm", "disk") for field in ("total", "read"))
                for name, beat in runs.items()
            }
            for name in self._shuffles.keys() - now.keys():
                self._ended_shuffles += self._shuffles[name]
            self._shuffles = now
            return self._ended_shuffles + sum(now.values())

    def _buffered(self) -> int:
        return sum(
            beat["comm"]["memory"] + beat["disk"]["memory"] for beat in self._runs().values()
        )

    def _runs(self) -> dict[Any, Any]:
        shuffle = self._worker.extensions.get("shuffle")
        beats: dict[Any, Any] = {} if shuffle is None else shuffle.heartbeat()
        return beats


def _spilled(data: Any) -> int:
    """Return bytes through the spill buffer, by files and by what stands on disk now."""
    moved = getattr(data, "cumulative_metrics", None)
    if not moved:
        return 0
    # Files may be compressed; the size in memory of what is on disk is not.
    return int(
        moved.get(("disk-read", "bytes"), 0)
        + moved.get(("disk-write", "bytes"), 0)
        + data.spilled_total.memory
    )
