"""What a worker tells its scheduler, and what it leaves for those who come after its death.

Batches of counts travel on the worker's own ordered stream, one a heartbeat's interval while there
is something to tell; single records only where the scheduler says that somebody wants rows. What
is sent is known to the scheduler: it has said so by the bootstrap, for an operation that it does
not know would close the worker's connection.

Covers: batches, rows, the flight file and what was found of others' in its directory.
Does not cover: actors' methods, in the flight file: that one is over is not always told.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import dask
from dask.typing import Key

from dask_memusage_exporter import flight
from dask_memusage_exporter.aggregate import Batch
from dask_memusage_exporter.measure.tracker import Bracket
from dask_memusage_exporter.records import TaskMemory, to_row

if TYPE_CHECKING:
    from distributed import Worker

    from dask_memusage_exporter.process import Process


#: Operations of the worker's stream; the scheduler's handlers are in ``scheduler``.
RECORDS_OP, BATCH_OP = "memusage-records", "memusage-batch"
HELLO_OP, GOODBYE_OP = "memusage-hello", "memusage-goodbye"


class Reporter:
    """One worker's reports. Everything runs on the worker's event loop unless said otherwise."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._process: Process | None = None
        self._batch: Batch | None = None
        self._flush_waits = False
        self._scheduler_id: str | None = None
        #: Whether the scheduler wants single records too.
        self.rows = False
        self._flight: flight.FlightFile | None = None
        self._slots: dict[Key, int] = {}
        #: Records made, and handed to the stream in batches.
        self._observed = self._sent = 0

    @property
    def heard(self) -> bool:
        """Whether the scheduler takes batches."""
        return self._scheduler_id is not None

    def listen(self, options: Mapping[str, Any], process: Process) -> None:
        """Take what the scheduler has said, and the process whose aggregate is ours."""
        if process is not self._process:
            self.flush()
            self._process, self._batch = process, Batch(process.settings.buckets)
        self.rows = bool(options.get("rows", self.rows))
        if options.get("listens") and not self.heard:
            self._scheduler_id = options["listens"]
            with process.health.guard("send"):
                self._say_hello(process)

    def report(self, record: TaskMemory) -> None:
        """Count a record, and send it where rows are wanted."""
        if self._batch is None:
            return
        self._batch.observe(record)
        self._observed += 1
        if self._flight is not None:
            self._flight.count(self._observed, self._sent)
        if not self._flush_waits:
            self._flush_waits = True
            self._worker.loop.call_later(self._interval(), self._flush_later)
        # Ahead of the task-finished message: rows are there when the client hears of the task.
        if self.rows and self.heard and not self._send(RECORDS_OP, rows=[to_row(record)]):
            self._drop(1)

    def flush(self) -> None:
        """Add what has been counted to the process's aggregate, and tell the scheduler."""
        process, batch = self._process, self._batch
        if process is None or batch is None:
            return
        records = batch.records
        tallies = batch.take()
        with process.health.guard("aggregate"):
            process.aggregate.add(tallies)
        if not self.heard or not records:
            return
        told = self._send(
            BATCH_OP,
            incarnation=self._flight.incarnation if self._flight is not None else None,
            records=records,
            buckets=len(process.settings.buckets),
            prefixes=tallies,
            health=process.health.rises(),
        )
        if told:
            self._sent += records
            if self._flight is not None:
                self._flight.count(self._observed, self._sent)
        elif not self.rows:
            self._drop(records)

    def goodbye(self) -> None:
        """Send what is left and take the flight file away: the worker ends in order."""
        self.flush()
        if self.heard:
            self._send(GOODBYE_OP)
        if self._flight is not None:
            self._flight.close()
            self._flight = None
        self._scheduler_id = None

    # -- the flight file -----------------------------------------------------------------

    def begins(self, key: Key) -> None:
        """Note that a task executes, where there is a slot left."""
        if self._flight is None:
            return
        self.ends(key)
        slot = self._flight.begin(flight.text_of(key), time.time())
        if slot is not None:
            self._slots[key] = slot

    def ends(self, key: Key) -> None:
        """Note that it executes no longer."""
        slot = self._slots.pop(key, None)
        if slot is not None and self._flight is not None:
            self._flight.end(slot)

    def note(self, open_brackets: Iterable[Bracket]) -> None:
        """Note how high tasks are; their tags are their keys. On the sampler's thread."""
        flight_file = self._flight
        if flight_file is None:
            return
        for bracket in open_brackets:
            slot = self._slots.get(bracket.tag)
            if slot is not None:
                flight_file.update(
                    slot,
                    start=bracket.start,
                    start_bytes=bracket.rss,
                    peak_bytes=bracket.peak,
                    concurrency=bracket.concurrency,
                )

    def running(self, brackets: Iterable[Bracket | None]) -> list[tuple[Any, ...]]:
        """Return what runs now, for the heartbeat; each as :class:`flight.Flying`."""
        by_key = {bracket.tag: bracket for bracket in brackets if bracket is not None}
        now = time.time()
        return [
            flight.Flying(
                flight.text_of(key), b.start, b.rss, b.peak, now, concurrency=b.concurrency
            )
            for key in list(self._slots)
            if (b := by_key.get(key)) is not None
        ]

    def _say_hello(self, process: Process) -> None:
        scheduler_id = self._scheduler_id or ""
        directory = process.settings.flight_directory or flight.default_directory(
            dask.config.get("temporary-directory", default=None)
        )
        directory = os.path.abspath(directory)
        hello: dict[str, Any] = {
            "directory": directory,
            "nanny": self._worker.nanny,
            "source": process.source_name,
        }
        try:
            wrecks = flight.salvage(directory, scheduler_id)
            hello["wrecks"] = [tuple(wreck) for wreck in wrecks]
            self._flight = flight.FlightFile(
                directory,
                {
                    "scheduler_id": scheduler_id,
                    "worker": self._worker.address,
                    "nanny": self._worker.nanny,
                },
            )
            hello["incarnation"] = self._flight.incarnation
        except OSError as error:
            mend = "give a directory with room that the worker may write to as memusage.flight-"
            error.strerror = (
                f"{error.strerror}; what it ran cannot be told if it dies; {mend}directory"
            )
            process.health.error("send", error)
        self._send(HELLO_OP, home=hello)

    # -- sending -------------------------------------------------------------------------

    def _interval(self) -> float:
        """Return seconds between batches: the heartbeat's, which Dask scales with the cluster."""
        beat = self._worker.periodic_callbacks.get("heartbeat")
        return 0.5 if beat is None else beat.callback_time / 1000

    def _flush_later(self) -> None:
        self._flush_waits = False
        self.flush()

    def _send(self, op: str, **message: Any) -> bool:
        stream = self._worker.batched_stream
        if stream is None or stream.comm is None or stream.comm.closed():
            return False  # Worker.batched_send would say nothing
        self._worker.batched_send({"op": op, **message})
        return True

    def _drop(self, records: int) -> None:
        if self._process is not None:
            self._process.health.drop("disconnected", records)
