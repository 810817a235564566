"""TaskMemory: the one record that flows from the worker to every exporter."""

from __future__ import annotations

from typing import Any, NamedTuple

from dask.typing import Key
from dask.utils import key_split


class TaskMemory(NamedTuple):
    """The memory of one execution of one task that started on a worker.

    A tuple, because it is made once a task on the worker's event loop and travels as it is.
    Sizes are bytes, times seconds since the epoch by the worker's own clock; None is "not known".
    """

    #: The task's key, as Dask has it.
    key: Key
    #: Dask's own ``task_prefix_name``.
    task_prefix: str
    #: Address of the worker.
    worker: str
    start: float
    stop: float
    #: Resident memory (RSS, children included) of the process when the task started.
    start_bytes: int
    #: Peak of the same while the task ran: everybody's when tasks overlap. Of a task that was
    #: killed the last one that was seen; both are 0 where none was.
    peak_bytes: int
    #: What the task itself added at its peak; None unless ``scope`` says that it is the task's own.
    growth_bytes: int | None
    #: Whose number it is: ``thread``, ``process`` or ``shared``.
    scope: str
    #: Why it is ``shared`` (see :mod:`dask_memusage_exporter.measure.scopes`); else None.
    reason: str | None
    #: Free in the process's heaps at the start; None where it was not or could not be asked.
    reusable_bytes: int | None
    #: What the worker itself moved meanwhile (transfers, spills, released results).
    foreign_bytes: int
    #: The most tasks in the process at once in the window, itself included.
    concurrency: int
    #: Sizes of the task's dependencies and of its result, as Dask estimates them.
    input_bytes: int | None
    output_bytes: int | None
    #: ``finished``, ``erred``, ``cancelled``, ``rescheduled`` or ``killed``.
    status: str
    #: Dask's own span id (``distributed.span``).
    span_id: str | None


def to_row(record: TaskMemory) -> tuple[Any, ...]:
    """Return what travels of a record: prefix and worker are known where it arrives."""
    return (record.key, *record[3:])


def from_row(row: object, worker: str) -> TaskMemory:
    """Return the record of a row; one field more or less is another version's, and no error.

    Raises
    ------
    Exception
        It is no row: of any kind, since anything may come over the wire.
    """
    if not isinstance(row, (tuple, list)):
        raise TypeError(f"no row: {row!r:.200}")
    rest = list(row[1 : len(TaskMemory._fields) - 2])
    rest += [None] * (len(TaskMemory._fields) - 3 - len(rest))
    record = TaskMemory(row[0], key_split(row[0]), worker, *rest)
    if not isinstance(record.start_bytes, int) or not isinstance(record.peak_bytes, int):
        raise TypeError(f"a record without sizes: {row!r:.200}")
    return record
