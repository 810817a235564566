"""Recordings: records kept at the scheduler for a client that asked (``recording.record``).

Covers: the sink that keeps them; beginning, fetching, and clients that go before they fetch.
Does not cover: the client's side (``recording``).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from dask_memusage_exporter.records import TaskMemory

if TYPE_CHECKING:
    from distributed import Scheduler

    from dask_memusage_exporter.deaths import Deaths
    from dask_memusage_exporter.rows import Rows

#: Records that the scheduler keeps for one recording.
MOST = 1_000_000

#: Operations of the scheduler.
START_OP, STOP_OP = "memusage_record_start", "memusage_record_stop"

#: Seconds that a recording waits at most for what became of workers that died in its block.
_PATIENCE = 5.0


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


class Recordings:
    """All recordings of one scheduler. Runs on its event loop.

    Parameters
    ----------
    rows
        Whose sinks they are while they last.
    deaths
        Who still finds out what workers that died were running.
    push
        Tells the workers whether records are wanted.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        rows: Rows,
        deaths: Deaths,
        push: Callable[[], Awaitable[None]],
    ) -> None:
        self._scheduler, self._rows, self._deaths, self._push = scheduler, rows, deaths, push
        #: By token.
        self._sinks: dict[str, RecordingSink] = {}

    async def start(self, client: str | None = None) -> str:
        """Keep all records from now on; return the token to fetch them by. Called by a client.

        Parameters
        ----------
        client
            Its id: with it the recording goes. None: it stays until it is fetched.
        """
        token = uuid.uuid4().hex
        self._sinks[token] = RecordingSink(client)
        self._rows.sinks.append(self._sinks[token])
        await self._push()
        if client is not None and client not in self._scheduler.clients:
            self.forget_client(client)  # it went before it was heard
        return token

    async def stop(self, token: str) -> tuple[list[tuple[Any, ...]], int] | None:
        """Return the records kept and how many were left out. Called by a client.

        None: nothing is kept any more, for the client had been gone or the scheduler closes.
        """
        sink = self._sinks.pop(token, None)
        if sink is None:
            return None
        sink.end(time.time())
        # The client hears that a worker died before we know which task it ran.
        deaths, most = self._deaths.unsettled, time.monotonic() + _PATIENCE
        while deaths & self._deaths.unsettled and time.monotonic() < most:
            await asyncio.sleep(0.02)
        if sink not in self._rows.sinks:
            return None  # the scheduler has closed meanwhile
        self._rows.sinks.remove(sink)
        await self._push()
        return sink.records, sink.left_out

    def forget_client(self, client: str) -> None:
        """Drop the recordings of a client that has gone: nobody will fetch them."""
        gone = [token for token, sink in self._sinks.items() if sink.client == client]
        for token in gone:
            self._rows.sinks.remove(self._sinks.pop(token))
        if gone:
            self._scheduler.loop.add_callback(self._push)

    def clear(self) -> None:
        """Forget all: the scheduler closes."""
        self._sinks.clear()
