"""What a worker itself moves through the process's memory: bytes that no task owns.

Covers: transfers in and out, results that arrive by scatter, spilling and unspilling, results that
are released, the buffers of P2P shuffles, messages of the scheduler with arguments inside graphs.
Does not cover: other messages before they are read to their end, and their copies. The tracker has
other witnesses for these: the processor time of the offload thread, on which what is larger than
10 MB is deserialised, and the event loop's page faults.

Counters are plain attributes of the worker, read from the task's thread without a lock: a number
that is one message old moves a bound by one message.

Source: tcp(7) with TCP_INFO, ``include/uapi/linux/tcp.h`` of the kernel.
"""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

from dask.typing import Key
from distributed.sizeof import safe_sizeof

#: ``tcpi_bytes_received`` of ``struct tcp_info``.
_RECEIVED = struct.Struct("=128xQ")
_TCP_INFO = getattr(socket, "TCP_INFO", None)


class Traffic:
    """Bytes moved by one worker.

    The difference between :meth:`closing` after a task and :meth:`opening` before it is what was
    transferred meanwhile, what was under way at either end included. Both are for the event loop:
    they read much that is in no processor's cache. What the worker has stored and let go is told
    by :meth:`stored`, on the task's thread: inputs are read back, and results that are no longer
    needed released, after a task has been told to run and before it does.
    """

    def __init__(self, worker: Any) -> None:
        # The objects behind these stay the same for the worker's life; this is the hot path.
        self._worker = worker
        self._state = worker.state
        #: Brought in by transfers and scatter, and all results that were ever held, added up at
        #: the worker's transitions.
        self.arrived = 0
        self.inserted = int(worker.state.nbytes)
        #: Written to disk and read back: sizes in memory, for files may be compressed.
        self.spilled = 0
        for calls in ("fast_to_slow_callbacks", "slow_to_fast_callbacks"):
            # zict.Buffer, which distributed's SpillBuffer is; other stores do not tell.
            getattr(worker.data, calls, []).append(self._on_spill)
        #: The connection to the scheduler, once it is known, and what has come on it.
        self._socket: Any = None
        self._received = 0
        self._lock = threading.RLock()  # a finalizer may come in between, see Tracker
        self._shuffles: dict[Any, int] = {}
        self._ended_shuffles = 0

    def arrive(self, key: Key) -> None:
        """Count a result that has been brought in."""
        if (task := self._state.tasks.get(key)) is not None:
            self.arrived += task.nbytes or 0

    def insert(self, key: Key) -> None:
        """Count a result that is held from now on."""
        if (task := self._state.tasks.get(key)) is not None:
            self.inserted += task.nbytes or 0

    def opening(self) -> int:
        """Return bytes moved so far, less those that are on their way out."""
        self._read_socket()
        return self._moved(self._runs()) - int(self._worker.transfer_outgoing_bytes)

    def closing(self, *, quick: bool = False) -> int:
        """Return bytes moved so far and those that are on their way in or wait in buffers.

        ``quick`` leaves out what has come from the scheduler since :meth:`opening`.
        """
        if not quick:
            self._read_socket()
        runs = self._runs()
        moved = self._moved(runs) + int(self._state.transfer_incoming_bytes)
        for beat in runs.values():
            moved += beat["comm"]["memory"] + beat["disk"]["memory"]
        return moved

    def _read_socket(self) -> None:
        """Ask what has been received on the scheduler's stream; 0 where it is no TCP connection.

        Arguments inside graphs come with it, and no counter of the worker's tells their size. In
        one process (``inproc``) they are not copied.
        """
        if self._socket is None:
            stream = getattr(self._worker.batched_stream, "comm", None)
            self._socket = getattr(getattr(stream, "stream", None), "socket", None)
        if self._socket is not None and _TCP_INFO is not None:
            try:
                info = self._socket.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _RECEIVED.size)
                (self._received,) = _RECEIVED.unpack(info)
            except (OSError, struct.error):  # closed, or an older kernel
                pass

    def stored(self) -> int:
        """Return bytes spilled, read back and released so far."""
        # What was held once and is no longer has been released. (The size of a single one is gone
        # by the time at which a plugin hears of it.)
        return self.spilled + self.inserted - int(self._state.nbytes)

    def _moved(self, runs: dict[Any, Any]) -> int:
        moved = self.arrived + self._worker.transfer_outgoing_bytes_total + self._received
        if runs or self._shuffles:
            self._count_shuffles(runs)
            moved += sum(self._shuffles.values())
        return int(moved) + self._ended_shuffles

    def _on_spill(self, _: Any, value: Any) -> None:
        self.spilled += safe_sizeof(value)

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
        if shuffle is None:
            return {}
        try:
            # The private dict behind `heartbeat`, because mostly it is empty and this is asked
            # twice a task; a version that has none is always asked.
            if not shuffle.shuffle_runs._active_runs:
                return {}
        except AttributeError:
            pass
        runs: dict[Any, Any] = shuffle.heartbeat()
        return runs
