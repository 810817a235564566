"""Batches: what workers have counted, added to the cluster's counts, all of one or none.

Covers: counts, exemplars and the workers' own health, all checked, since anything may come over the
wire; what a process had counted and could not report before its end.
Does not cover: single records (``rows``); how it is known that a process has ended (``deaths``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tornado.ioloop import IOLoop

from dask_memusage_exporter.aggregate import Aggregate, checked, is_count
from dask_memusage_exporter.exemplars import Exemplars
from dask_memusage_exporter.exemplars import checked as checked_exemplars
from dask_memusage_exporter.health import Health

#: Seconds for which it is remembered what workers that have gone had reported.
_LATE = 3600


class Batches:
    """Takes batches in; runs on the scheduler's event loop.

    Parameters
    ----------
    aggregate, exemplars, health
        What they are added to.
    """

    def __init__(
        self, loop: IOLoop, *, aggregate: Aggregate, exemplars: Exemplars, health: Health
    ) -> None:
        self._loop = loop
        self._aggregate, self._exemplars, self._health = aggregate, exemplars, health
        #: Records that have come, by incarnation: of processes that live, and of those that have
        #: gone for a while.
        self._received: dict[str, int] = {}

    def take(
        self,
        worker: str = "",
        incarnation: str | None = None,
        records: int = 0,
        buckets: int = 0,
        fingerprint: int | None = None,
        prefixes: Iterable[Any] = (),
        health: Mapping[str, Any] | None = None,
        exemplars: Iterable[Any] = (),
        **_: Any,
    ) -> None:
        """Add a worker's counts to the cluster's, all or none.

        Never raises. A batch whose health or exemplars are wrong still has its counts.
        """
        counted = False
        with self._health.guard("aggregate"):
            try:
                tallies = self._checked(
                    worker, incarnation, records, buckets, fingerprint, prefixes
                )
            except ValueError:
                # At least one, where even the number is none.
                self._health.drop("invalid", records if is_count(records) else 1)
                self._receive(incarnation, records)
                raise
            self._aggregate.add(tallies)
            self._receive(incarnation, records)
            counted = True
        with self._health.guard("aggregate"):
            self.take_health(health)
        with self._health.guard("aggregate"):
            if exemplars and counted:
                self._exemplars.merge(checked_exemplars(exemplars), self._aggregate.counted_under)

    def take_health(self, health: Mapping[str, Any] | None) -> None:
        """Add what a worker's own counters have risen by; raises where one of them is no rise."""
        self._health.add(_checked_rises(health or {}))

    def end(self, incarnation: str, observed: int | None) -> None:
        """Count what a process that has ended had measured and could not report any more."""
        if observed is None:  # somebody may still tell
            self._loop.call_later(_LATE, self._received.pop, incarnation, None)
            return
        lost = observed - self._received.pop(incarnation, 0)
        if lost > 0:
            self._health.drop("worker_gone", lost)

    def _receive(self, incarnation: Any, records: Any) -> None:
        """Remember what has come of a process, taken in or not: it is not lost with it again."""
        if type(incarnation) is str and is_count(records):
            self._received[incarnation] = self._received.get(incarnation, 0) + records

    def _checked(
        self,
        worker: str,
        incarnation: Any,
        records: Any,
        buckets: Any,
        fingerprint: Any,
        prefixes: Iterable[Any],
    ) -> list[tuple[str, tuple[Any, ...]]]:
        """Return a batch that can be added; ValueError where it cannot."""
        bounds = self._aggregate.bounds
        # Workers of before the fingerprint send the number alone.
        known = type(fingerprint) is int
        if buckets != len(bounds) or (known and fingerprint != self._aggregate.fingerprint):
            raise ValueError(
                f"worker {worker} counts in {buckets} buckets and not in the scheduler's "
                f"{len(bounds)}, or with other bounds; restart it, to take the scheduler's settings"
            )
        if not is_count(records) or not (incarnation is None or type(incarnation) is str):
            raise ValueError(f"worker {worker} sent no batch of counts")
        return checked(prefixes, len(bounds) + 1)


def _checked_rises(health: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return what a worker's own counters have risen by; raises where one of them is no rise."""
    rises = {name: dict(health.get(name, {})) for name in ("errors", "seconds", "dropped")}
    for name, counts in rises.items():
        for key, rise in counts.items():
            if type(rise) not in (int, float) or not 0 <= rise < 2**63:
                raise ValueError(f"not a rise of a worker's {name}: {key!r:.99} by {rise!r:.99}")
    return rises
