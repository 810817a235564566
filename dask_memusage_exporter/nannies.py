"""Nannies, as the scheduler sees them: asked to start their workers on jemalloc.

Covers: nannies that are there and that come later; a line in the log of workers that have none.
Does not cover: what a nanny does then (``nanny``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from distributed.protocol.pickle import dumps

from dask_memusage_exporter.bootstrap import NannyByValue

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("distributed.scheduler.memusage")

#: Seconds in which workers that join are told of together, and how many by name.
_MOMENT, _NAMED = 1.0, 10


class Nannies:
    """The nannies of one scheduler's cluster.

    Parameters
    ----------
    source_of
        Returns where a worker's peaks come from; None where it has not said.
    """

    def __init__(self, scheduler: Scheduler, *, source_of: Callable[[str], str | None]) -> None:
        self._scheduler, self._source_of = scheduler, source_of
        #: Whether they have been asked.
        self._asked = self._said_bare = False
        #: Workers that nobody can have start on jemalloc, until that is said.
        self._bare: set[str] = set()

    async def turn_jemalloc_on(self, path: str | None) -> None:
        """Have them start their workers anew on jemalloc, and those that come later too.

        Parameters
        ----------
        path
            The library; None: where each nanny finds one.
        """
        await self._scheduler.register_nanny_plugin(
            comm=None,
            plugin=dumps(NannyByValue({"path": path})),
            name=NannyByValue.name,
            idempotent=False,
        )
        self._asked = True

    def heed(self, worker: str) -> None:
        """Take note of a worker that is not on jemalloc and has no nanny to start it anew."""
        state, source = self._scheduler.workers.get(worker), self._source_of(worker)
        if not self._asked or self._said_bare or state is None or state.nanny:
            return
        if source not in (None, "jemalloc"):  # None: it has not said hello yet
            if not self._bare:
                self._scheduler.loop.call_later(_MOMENT, self._say_bare)
            self._bare.add(worker)

    def _say_bare(self) -> None:
        """Warn once, or it would be a line for each that joins."""
        self._said_bare = True
        names, more = sorted(self._bare)[:_NAMED], len(self._bare) - _NAMED
        self._bare.clear()
        logger.warning(
            "dask-memusage: jemalloc cannot be turned on for workers without a nanny: %s%s. Start "
            "their processes with the variables that `dask memusage doctor` prints on their "
            "machine, or start them with a nanny",
            ", ".join(names),
            f" and {more} more" if more > 0 else "",
        )
