"""Tasks that run at once: whether each can have touched memory while the other was open.

By processor time: whoever has used none meanwhile has touched nothing. An orchestrating task that
only waits for others makes nobody's number everybody's.

All of it is called with the tracker locked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from dask_memusage_exporter.measure import threads
from dask_memusage_exporter.measure.bracket import Bracket


class Neighbours:
    """Accounts of processor time of brackets that are open at once."""

    def __init__(self) -> None:
        #: CPU clocks of threads whose activity is told by other means: the event loop's, ours and
        #: those that the tracker has as witnesses.
        self._explained: list[int] = []

    def explain(self, clock: int) -> None:
        """Take the CPU clock of a thread that is no task's."""
        if clock not in self._explained:
            self._explained.append(clock)

    def meet(self, new: Bracket, opened: Sequence[Bracket]) -> None:
        """Let a bracket that opens and those that are open know of each other."""
        self._open_account(new)
        new.others = {}
        for bracket in opened:
            new.others[bracket] = threads.cpu_ns(bracket.clock)
            if bracket.others is None:  # its first neighbour
                bracket.others = {}
                self._open_account(bracket)
            bracket.concurrency = max(bracket.concurrency, len(opened) + 1)
        new.concurrency = len(opened) + 1

    def _open_account(self, bracket: Bracket) -> None:
        """Note processor times from which a bracket is no longer alone."""
        bracket.cpu = threads.cpu_ns(bracket.clock)
        bracket.process_cpu = time.process_time_ns()
        bracket.house_cpu = self._house_cpu()

    def close_account(self, bracket: Bracket) -> None:
        """Say from processor times whether others can have touched memory meanwhile."""
        # A neighbour may be idle itself and have helper threads that are not.
        process = time.process_time_ns() - bracket.process_cpu
        own = threads.between(bracket.cpu, threads.cpu_ns(bracket.clock))
        house = self._house_cpu() - bracket.house_cpu
        unexplained = process - own - house - bracket.neighbours
        bracket.overlapped |= bracket.neighbours > threads.IDLE_NS or unexplained > max(
            threads.UNEXPLAINED_NS, threads.UNEXPLAINED_SHARE * process
        )

    def _house_cpu(self) -> int:
        return threads.total(map(threads.cpu_ns, self._explained))


def part(ending: Bracket, staying: Sequence[Bracket]) -> None:
    """Settle what a bracket that ends and those that stay open have used since both were open."""
    used = threads.cpu_ns(ending.clock)
    for bracket in staying:
        # One without a thread of its own (coroutines) has used "infinitely" much, for it can have
        # done anything.
        before = (bracket.others or {}).get(ending, ending.cpu)
        bracket.neighbours += threads.between(before, used)
        before = (ending.others or {}).get(bracket, bracket.cpu)
        cpu = threads.cpu_ns(bracket.clock)
        ending.neighbours += threads.between(before, cpu)
        if bracket.others is not None:
            bracket.others.pop(ending, None)
