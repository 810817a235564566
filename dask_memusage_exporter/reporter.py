"""What a worker tells its scheduler, and what it leaves for those who come after its death.

Batches of counts travel on the worker's own ordered stream, one a heartbeat's interval while there
is something to tell; single records only where the scheduler says that somebody wants rows. What
is sent is known to the scheduler: it has said so by the bootstrap, for an operation that it does
not know would close the worker's connection.

Covers: batches, rows, the flight file and what was found of others' in its directory.
Does not cover: actors' methods, in the flight file: that one is over is not always told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import dask
from dask.typing import Key

from dask_memusage_exporter import flight
from dask_memusage_exporter.aggregate import Batch
from dask_memusage_exporter.exemplars import Exemplars
from dask_memusage_exporter.measure.bracket import Bracket
from dask_memusage_exporter.records import TaskMemory, to_row

if TYPE_CHECKING:
    from distributed import Worker

    from dask_memusage_exporter.process import Process


#: Operations of the worker's stream; the scheduler's handlers are in ``scheduler_agent``.
RECORDS_OP, BATCH_OP = "memusage-records", "memusage-batch"
HELLO_OP, GOODBYE_OP = "memusage-hello", "memusage-goodbye"
#: A handler of the scheduler's: goodbye by whoever can still say it.
LEAVING_OP = "memusage_leaving"

#: Records that wait to be made, at most.
_MOST_UNMADE = 100

#: Batches that wait for the goodbye of a worker whose stream is broken: it closes soon, but for a
#: task that does not end.
_MOST_UNSENT = 1_000

#: Seconds that a worker's hello may take; it is some milliseconds.
_INTRODUCTION = 0.1

#: Seconds that a worker's goodbye may take where its stream is broken.
_LEAVING = 1.0


class Reporter:
    """One worker's reports. Everything runs on the worker's event loop unless said otherwise."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._process: Process | None = None
        self._batch: Batch | None = None
        self._exemplars: Exemplars | None = None
        #: Records that are counted and not made yet.
        self._unmade: list[Callable[[], TaskMemory]] = []
        self._flush_waits = False
        self._scheduler_id: str | None = None
        #: Whether the scheduler wants single records too.
        self.rows = False
        self._flight: flight.FlightFile | None = None
        self._incarnation = uuid.uuid4().hex
        #: Batches that the stream did not take. What is pushed out is missing at the scheduler,
        #: which counts it when it hears how many records there were.
        self._unsent: deque[dict[str, Any]] = deque(maxlen=_MOST_UNSENT)
        #: What executes, with its slot in the flight file, if it has one.
        self._slots: dict[Key, int | None] = {}
        #: Records made.
        self._observed = 0

    @property
    def heard(self) -> bool:
        """Whether the scheduler takes batches."""
        return self._scheduler_id is not None

    def listen(self, options: Mapping[str, Any], process: Process) -> None:
        """Take what the scheduler has said, and the process whose aggregate is ours."""
        if process is not self._process:
            self.flush()
            bounds = process.settings.buckets
            self._process, self._batch = process, Batch(bounds)
            self._exemplars = Exemplars(bounds, Batch.most_prefixes)
        self.rows = bool(options.get("rows", self.rows))
        if options.get("listens") and not self.heard:
            self._scheduler_id = options["listens"]
            with process.health.guard("send"):
                self._say_hello(process)

    def report(self, record: TaskMemory) -> None:
        """Count a record, and send it where rows are wanted."""
        if self._process is None or self._batch is None:
            return
        self._make()  # in their order: the first prefixes get the labels
        self._observe(record)
        self._expect()
        # Ahead of the task-finished message: rows are there when the client hears of the task.
        if self.rows and self.heard and not self._send(RECORDS_OP, rows=[to_row(record)]):
            self._process.health.drop("disconnected")

    def report_later(self, record: Callable[[], TaskMemory]) -> None:
        """Count a record that will be made then: many at once take less time than one by one."""
        self._unmade.append(record)
        self._expect()
        if len(self._unmade) >= _MOST_UNMADE:
            self._make()

    def _make(self) -> None:
        process = self._process
        if process is None or not self._unmade:
            return
        unmade, self._unmade = self._unmade, []
        for record in unmade:
            with process.health.guard("record"):
                self._observe(record())

    def _observe(self, record: TaskMemory) -> None:
        if self._process is None or self._batch is None:
            return
        self._batch.observe(record)
        instruments = self._process.telemetry.instruments
        if instruments is not None:
            with self._process.health.guard("export"):
                label = self._process.aggregate.label_of(record.task_prefix)
                instruments.record(record, label)

    def _expect(self) -> None:
        """Note that there is one record more, and see that it is sent."""
        self._observed += 1
        if self._flight is not None:
            self._flight.count(self._observed)
        self._flush_soon()

    def exemplify(self, record: TaskMemory, trace_id: int, span_id: int) -> None:
        """Take the span of a record, once it is known to be kept. From any thread."""
        exemplars = self._exemplars
        if exemplars is not None and exemplars.observe(record, trace_id, span_id):
            # Its record may have been sent, and be the last one.
            self._worker.loop.add_callback(self._flush_soon)

    def _flush_soon(self) -> None:
        if not self._flush_waits:
            self._flush_waits = True
            self._worker.loop.call_later(self._interval(), self._flush_later)

    def flush(self) -> None:
        """Add what has been counted to the process's aggregate, and tell the scheduler."""
        self._make()
        process, batch, exemplars = self._process, self._batch, self._exemplars
        if process is None or batch is None or exemplars is None:
            return
        records = batch.records
        tallies, examples = batch.take(), exemplars.take()
        with process.health.guard("aggregate"):
            process.aggregate.add(tallies)
            process.exemplars.merge(examples, process.aggregate.counted_under)
        if not self.heard or not (records or examples):
            return
        message: dict[str, Any] = {
            "incarnation": self._incarnation,
            "records": records,
            "buckets": len(process.settings.buckets),
            "fingerprint": batch.fingerprint,
            "prefixes": tallies,
            "health": process.health.rises(),
        }
        if examples:  # where there are no spans there is nothing more to send
            message["exemplars"] = examples
        if not self._send(BATCH_OP, **message):
            self._unsent.append(message)

    async def goodbye(self, seconds: float) -> None:
        """Send what is left and take the flight file away: the worker ends in order.

        ``seconds`` is how long that may take where its stream is broken.
        """
        self.end_all()
        self.flush()
        if not self.heard:
            return
        parting: dict[str, Any] = {"incarnation": self._incarnation, "observed": self._observed}
        if self._process is not None:
            parting["health"] = self._process.health.rises()
        told = not self._unsent and self._send(GOODBYE_OP, **parting)
        if not told:
            # The stream is broken, or was for a while: by a connection of its own.
            leaving = getattr(self._worker.scheduler, LEAVING_OP)(
                worker=self._worker.address, batches=list(self._unsent), **parting
            )
            with contextlib.suppress(Exception):  # it may be gone too
                await asyncio.wait_for(leaving, min(_LEAVING, seconds))
                told = True
        if self._flight is not None:
            # Who reads it then counts what was lost.
            self._flight.close() if told else self._flight.forget()
            self._flight = None
        self._scheduler_id = None

    # -- the flight file -----------------------------------------------------------------

    def begins(self, key: Key, *, runs: bool) -> None:
        """Note that a task is handed over; ``runs`` where it has no thread that will say when."""
        self.ends(key)
        slot = None
        if self._flight is not None:
            slot = self._flight.begin(key, time.time())
            if slot is not None and runs:
                self._flight.states[slot] = flight.RUNS
        self._slots[key] = slot

    def runs(self, key: Key, runs: bool) -> None:
        """Note that a task's own code begins to run, or has ended. On the task's thread."""
        slot = self._slots.get(key)
        if slot is not None and self._flight is not None:
            self._flight.states[slot] = flight.RUNS if runs else flight.WAITS

    def ends(self, key: Key) -> None:
        """Note that it is over."""
        if key in self._slots:
            slot = self._slots.pop(key)
            if self._flight is not None:
                self._flight.end(slot)

    def end_all(self) -> None:
        """Note that nothing is measured any more."""
        for key in list(self._slots):
            self.ends(key)

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
                    bracket.tag,
                    start=bracket.start,
                    start_bytes=bracket.rss,
                    peak_bytes=bracket.peak,
                    concurrency=bracket.concurrency,
                )

    def running(self, brackets: Iterable[Bracket | None]) -> list[tuple[Any, ...]]:
        """Return what runs now, for the heartbeat; each as :class:`flight.Flying`."""
        now = time.time()
        return [
            flight.Flying(
                flight.text_of(one.tag),
                one.start,
                one.rss,
                one.peak,
                now,
                one.concurrency,
                flight.digest_of(one.tag),
            )
            for one in brackets
            if one is not None and one.tag in self._slots
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
            "pid": os.getpid(),
            # Known by this on the scheduler, with a file or without.
            "incarnation": self._incarnation,
        }
        try:
            wrecks = flight.salvage(directory, scheduler_id)
            hello["wrecks"] = [tuple(wreck) for wreck in wrecks]
            self._flight = flight.FlightFile(
                directory,
                {
                    "incarnation": self._incarnation,
                    "scheduler_id": scheduler_id,
                    "worker": self._worker.address,
                    "nanny": self._worker.nanny,
                },
            )
        except OSError as error:
            mend = "give a directory with room that the worker may write to as memusage.flight-"
            error.strerror = (
                f"{error.strerror}; what it ran cannot be told if it dies; {mend}directory"
            )
            process.health.error("send", error)
        self._send(HELLO_OP, home=hello, health=process.health.rises())

    async def introduction(self) -> None:
        """Wait until the hello is on its way.

        A task may hold the GIL from its first line until its worker is killed; then nobody would
        know where the flight file is.
        """
        stream, began = self._worker.batched_stream, time.perf_counter()
        while stream is not None and stream.buffer:
            if time.perf_counter() - began > _INTRODUCTION:
                break
            await asyncio.sleep(0.001)

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
