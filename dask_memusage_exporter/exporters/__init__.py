"""Exporters: one a file, each takes records or aggregates and shows them somewhere.

To add an exporter of single records: 1. a class with the shape of :class:`RecordSink`, 2. add it
to the scheduler's sinks (``SchedulerAgent.add_sink``), 3. a test with a failing target: a sink
must swallow, count and go on.
"""

from __future__ import annotations

from typing import Protocol

from dask_memusage_exporter.records import TaskMemory


class RecordSink(Protocol):
    """Takes every record that arrives at the scheduler, on its event loop."""

    def write(self, record: TaskMemory) -> None:
        """Take one record. Never raises."""

    def flush(self) -> None:
        """Let everything that was taken be seen. Never raises.

        Called once for all records that arrived together, before any client hears of their tasks.
        """

    def close(self) -> None:
        """Flush and let go."""
