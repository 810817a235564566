"""``record``: the records of what runs inside a ``with`` block, for notebooks.

>>> with record(client) as recording:  # doctest: +SKIP
...     graph.compute()
>>> recording.by_prefix()  # doctest: +SKIP

Covers: every execution that ends inside the block, whoever submitted it to the cluster.
Does not cover: more records than the scheduler keeps (:data:`exporters.recordings.MOST`); the rest
are counted in ``recording.left_out``. A scheduler or a connection that is lost inside the block:
the records are lost with it, and an error says so, or a warning where the block has its own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from distributed import Client

from dask_memusage_exporter.exporters.recordings import START_OP, STOP_OP
from dask_memusage_exporter.install import default_target, install
from dask_memusage_exporter.records import TaskMemory

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas

logger = logging.getLogger("distributed.client.memusage")

_LOST = (
    "the client has lost its connection to the scheduler inside the block, and the records went "
    "with the scheduler that kept them"
)


class Recording:
    """What was recorded. Made by :func:`record`; filled when its block ends.

    Attributes
    ----------
    records : list of TaskMemory
        In order of arrival at the scheduler.
    left_out : int
        How many more there were than the scheduler keeps.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._token: str | None = None
        self.records: list[TaskMemory] = []
        self.left_out = 0

    def __enter__(self) -> Recording:
        install(self._client)
        self._token = self._client.sync(self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # Ahead of sync, which may find no loop to run on.
            self._check_connected()
            self._client.sync(self._stop)
        except Exception as error:
            self._on_lost(kind, error)

    async def __aenter__(self) -> Recording:
        await install(self._client)
        self._token = await self._start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            await self._stop()
        except Exception as error:
            self._on_lost(kind, error)

    async def _start(self) -> Any:
        return await getattr(self._client.scheduler, START_OP)(client=self._client.id)

    async def _stop(self) -> None:
        self._check_connected()
        try:
            kept = await getattr(self._client.scheduler, STOP_OP)(token=self._token)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(_LOST) from error
        if kept is None:
            raise ConnectionError(_LOST)
        rows, self.left_out = kept
        self.records = [TaskMemory(*row) for row in rows]

    def _check_connected(self) -> None:
        # A client that connects anew is a new one to the scheduler, which has dropped the records.
        if self._client.scheduler is None or self._client.status != "running":
            raise ConnectionError(_LOST)

    def _on_lost(self, kind: type[BaseException] | None, error: Exception) -> None:
        """Raise an error of ours, or log it where it would hide the block's own."""
        if kind is None:
            raise error
        logger.warning("dask-memusage: nothing was recorded (%s: %s)", type(error).__name__, error)

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row a record, the fields of :class:`TaskMemory` as columns.

        Unknown values are NA: sizes are of the nullable type ``Int64``, in bytes; times are
        ``datetime64`` in UTC by the worker's clock. The peak of a task that was killed is the last
        one that was seen.
        """
        import pandas

        frame = pandas.DataFrame(self.records, columns=list(TaskMemory._fields))
        sizes = [name for name in frame.columns if name.endswith("_bytes")]
        frame = frame.astype(dict.fromkeys([*sizes, "concurrency"], "Int64"))
        seen = ["start_bytes", "peak_bytes"]
        frame[seen] = frame[seen].mask(frame[seen] == 0)
        for name in ("start", "stop"):
            frame[name] = pandas.to_datetime(frame[name].astype(float), unit="s", utc=True)
        return frame

    def by_prefix(self) -> pandas.DataFrame:
        """Return one row a prefix: tasks, how many have a growth of their own, quantiles in bytes.

        Columns of growth are over the tasks of scope ``thread`` or ``process`` alone, and NA where
        there is none. Tasks that were killed have a column, and are in no other: how high they
        would have been nobody knows.
        """
        import pandas

        frame = self.to_pandas()
        killed = frame["status"] == "killed"
        by_prefix = frame.groupby("task_prefix")
        groups = frame[~killed].groupby("task_prefix")
        columns = {
            "tasks": (~killed).groupby(frame["task_prefix"]).sum(),
            "own_growth": by_prefix["growth_bytes"].count(),
            "killed": killed.groupby(frame["task_prefix"]).sum(),
        }
        for name in ("peak", "growth"):
            sizes = groups[f"{name}_bytes"]
            columns[f"{name}_p50"] = sizes.quantile(0.5)
            columns[f"{name}_p95"] = sizes.quantile(0.95)
            columns[f"{name}_max"] = sizes.max()
        table = pandas.DataFrame(columns)
        order = ["growth_max", "peak_max"]
        return table.sort_values(order, ascending=False)

    def plot(self, axes: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Draw each task's peak over time, one colour a prefix; hollow where growth is not its own.

        A cross is the last peak that was seen of a task that was killed.

        Parameters
        ----------
        axes
            Where to draw; None: a new figure. Needs matplotlib.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        frame = self.to_pandas()
        for number, (prefix, tasks) in enumerate(frame.groupby("task_prefix")):
            own, colour, label = tasks["growth_bytes"].notna(), f"C{number % 10}", f"{prefix}"
            killed = tasks["status"] == "killed"
            seen = killed & tasks["peak_bytes"].notna()
            kinds = ((own, colour, "o"), (~own & ~killed, "none", "o"), (seen, colour, "X"))
            for chosen, filling, marker in kinds:
                if chosen.any():
                    peaks = tasks["peak_bytes"][chosen].astype(float) / 2**20
                    axes.scatter(
                        tasks["stop"][chosen], peaks, s=18,
                        facecolors=filling, edgecolors=colour, marker=marker, label=label,
                    )  # fmt: skip
                    label = ""  # matplotlib leaves it out of the legend
        axes.set_ylabel("peak of the process (MiB)")
        axes.set_ylim(bottom=0)
        axes.set_title("Peak memory by task (hollow: shared with others; cross: killed)")
        if self.records:
            axes.legend(title="prefix", loc="upper left", bbox_to_anchor=(1, 1))
        return axes


def record(client: Client | None = None) -> Recording:
    """Record the memory of every task that ends inside a ``with`` block.

    Parameters
    ----------
    client
        None: the default client. With an asynchronous one use ``async with``.

    Returns
    -------
    Recording
        Filled when the block ends.

    Raises
    ------
    ValueError
        There is no default client.
    ConnectionError
        At the end of a block that raised nothing itself: the records are lost with the scheduler.
    """
    return Recording(client if client is not None else default_target())
