"""Rows: single records at the scheduler, given to the sinks that want them.

Covers: records from workers' streams, and kills; all sinks show them before any client hears of
their tasks.
Does not cover: what a sink does with them (``exporters``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from tornado.ioloop import IOLoop

from dask_memusage_exporter.exporters import RecordSink
from dask_memusage_exporter.exporters.csv_file import CsvFile
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.records import TaskMemory, from_row

logger = logging.getLogger("distributed.scheduler.memusage")


class Rows:
    """Gives records to sinks; runs on the scheduler's event loop.

    Parameters
    ----------
    source_of
        Returns where a worker's peaks come from; None where it has not said.
    """

    def __init__(
        self, loop: IOLoop, *, health: Health, source_of: Callable[[str], str | None]
    ) -> None:
        self._loop, self._health, self._source_of = loop, health, source_of
        self.sinks: list[RecordSink] = []
        self._flush_waits = self._said_overlap = False

    def add_csv(self, path: str | os.PathLike[str], columns: str) -> None:
        """Write a CSV from now on; a file that is being written already is left alone.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        if not any(isinstance(sink, CsvFile) and sink.is_at(path) for sink in self.sinks):
            csv_file = CsvFile(path, columns=columns, health=self._health)
            self.sinks.append(csv_file)
            logger.info("dask-memusage: writing %s", csv_file.path)

    def take(self, rows: object = (), worker: str = "", **_: Any) -> None:
        """Take records in from a worker's stream. Never raises."""
        with self._health.guard("record"):
            for row in rows if isinstance(rows, (tuple, list)) else (rows,):
                try:
                    record = from_row(row, worker)
                except Exception as error:
                    self._health.drop("invalid")
                    self._health.error("record", error)
                    continue
                self._write(record)
                if record.reason == "overlap" and not self._said_overlap:
                    self._say_overlap(worker)
            if not self._flush_waits:
                # A record comes before the message that its task has finished, on the same
                # stream, and clients are told by a later round of the loop than the next one.
                self._flush_waits = True
                self._loop.add_callback(self._flush)

    def show(self, record: TaskMemory) -> None:
        """Take one record of the scheduler's own, which is seen at once."""
        self._write(record)
        self._flush()

    def _write(self, record: TaskMemory) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _flush(self) -> None:
        self._flush_waits = False
        with self._health.guard("csv"):
            for sink in self.sinks:
                sink.flush()

    def _say_overlap(self, worker: str) -> None:
        """Warn once who reads the old tool's columns as sizes of tasks."""
        if self._source_of(worker) == "jemalloc":
            return  # few have no growth there, and what would be said is done
        if any(isinstance(sink, CsvFile) for sink in self.sinks):
            self._said_overlap = True
            logger.warning(
                "dask-memusage: tasks overlap in a worker's process, and max_memory_mb of those is "
                "of them all together. Run one thread a worker, or turn jemalloc on "
                "(memusage.jemalloc), and see growth_bytes and scope (memusage.csv.columns: full)"
            )

    def close(self) -> None:
        """Close all sinks."""
        while self.sinks:
            self.sinks.pop().close()
