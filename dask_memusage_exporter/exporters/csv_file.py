"""The CSV of dask-memusage, and the same with every field of the record.

Covers: the three old columns exactly, all columns of ``TaskMemory`` behind them, rows in the file
when ``flush`` returns, a disk that fills (whole rows only, each lost one counted).
Does not cover: rotation. An existing file is overwritten, as by the old tool.
"""

from __future__ import annotations

import csv
import io
import os
from contextlib import suppress
from typing import Any

from dask_memusage_exporter.config import MIB
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.records import TaskMemory

#: What dask-memusage 1.1 writes; MB are 2**20 bytes.
TASK_COLUMNS = ("task_key", "min_memory_mb", "max_memory_mb")

#: What ``memusage.csv.columns: full`` appends, in this order.
FULL_COLUMNS = (*TASK_COLUMNS, *TaskMemory._fields[1:])

#: Opening a pipe that nobody reads, or writing to a full one, must not hold the scheduler up.
WRITING = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK

#: The old file has a row for these only.
_OLD_STATUSES = frozenset({"finished", "erred"})


class CsvFile:
    """A CSV file with one row a record.

    Parameters
    ----------
    path
        Overwritten if it is there. Relative to the scheduler's working directory. A pipe is never
        waited for.
    columns
        ``task`` or ``full``.
    health
        Where lost rows are counted.

    Raises
    ------
    OSError
        The file cannot be written; the message says how to mend it.
    """

    def __init__(self, path: str | os.PathLike[str], *, columns: str, health: Health) -> None:
        self.path = os.path.abspath(path)
        self.columns = columns
        self._health = health
        self._full = columns == "full"
        self._lines = io.StringIO()
        self._writer = csv.writer(self._lines)
        self._waiting = self._size = 0
        try:
            self._fd = os.open(self.path, WRITING | os.O_TRUNC, 0o666)
            try:
                self._writer.writerow(FULL_COLUMNS if self._full else TASK_COLUMNS)
                self._append()
            except OSError:
                os.close(self._fd)
                raise
        except OSError as error:
            raise type(error)(
                error.errno,
                f"the CSV file cannot be written ({error.strerror}); give a path in a directory "
                "that exists and that the scheduler's process may write to",
                self.path,
            ) from None

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a path leads to this very file, by whatever name."""
        with suppress(OSError):
            return self._fd >= 0 and os.path.samestat(os.stat(path), os.fstat(self._fd))
        return False

    def write(self, record: TaskMemory) -> None:
        """Take one row, if the format has one for such a record; :meth:`flush` writes it."""
        if not self._full and record.status not in _OLD_STATUSES:
            return
        # No process has 0 bytes: a task that was killed before anybody had looked has no sizes.
        sizes = record.start_bytes or None, record.peak_bytes or None
        row: tuple[Any, ...] = (record.key, *(size and size / MIB for size in sizes))
        if self._full:
            row += (*record[1:5], *sizes, *record[7:])
        self._writer.writerow(row)
        self._waiting += 1

    def flush(self) -> None:
        """Write the rows that wait: whole rows in one call, or none of them."""
        if not self._waiting:
            return
        rows, self._waiting = self._waiting, 0
        try:
            self._append()
        except OSError as error:
            self._health.drop("csv_write", rows)
            self._health.error("csv", self._named(error))

    def close(self) -> None:
        """Write what waits and close the file."""
        if self._fd >= 0:
            self.flush()
            try:
                os.close(self._fd)
            except OSError as error:  # a network file system may tell only now
                self._health.error("csv", self._named(error))
            self._fd = -1

    def _named(self, error: OSError) -> OSError:
        """Return an error of a write, for the log: what it says of itself names no file."""
        return type(error)(
            error.errno,
            f"{error.strerror}; rows that are lost are counted in "
            'task_memory_dropped_records_total{reason="csv_write"}',
            self.path,
        )

    def _append(self) -> None:
        # A key that is no valid text must not make the file unreadable for all others.
        text = self._lines.getvalue().encode("utf-8", "backslashreplace")
        self._lines.seek(0)
        self._lines.truncate()
        try:
            written = os.write(self._fd, text)
            while written < len(text):
                written += os.write(self._fd, text[written:])
        except OSError:
            # Part of a row may be there: take it off, so that the next one starts a line.
            with suppress(OSError):  # not a regular file
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
            raise
        self._size += len(text)
