"""Recordings: records kept at the scheduler for a client that asked (``recording.record``)."""

from __future__ import annotations

from typing import Any

from dask_memusage_exporter.records import TaskMemory

#: Records that the scheduler keeps for one recording.
MOST = 1_000_000

#: Operations of the scheduler.
START_OP, STOP_OP = "memusage_record_start", "memusage_record_stop"


class RecordingSink:
    """Keeps records at the scheduler until they are fetched.

    Parameters
    ----------
    client
        The id of the one who will fetch them, if it is known.
    """

    def __init__(self, client: str | None) -> None:
        self.client = client
        self.records: list[tuple[Any, ...]] = []
        self.left_out = 0
        self._end: float | None = None

    def end(self, now: float) -> None:
        """Keep from now on only kills of before, which are told late; seconds since the epoch."""
        self._end = now

    def write(self, record: TaskMemory) -> None:
        """Keep one record."""
        # Kills have the scheduler's clock, which this is; other records have their worker's.
        if self._end is not None and (record.status != "killed" or record.stop > self._end):
            return
        if len(self.records) < MOST:
            self.records.append(tuple(record))
        else:
            self.left_out += 1

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
