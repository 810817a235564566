"""The spans of what runs on one worker: started, current while its code runs, and ended.

Covers: spans of tasks on threads and in coroutines; spans of actors' calls, which have no record to
end with, and of which those that raise on a thread end when the event loop is told of the error.
Does not cover: what spans say and who sends them (``spans``); the end of a task's, with its record
(``executions``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from time import time
from typing import TYPE_CHECKING, Any

from dask.typing import Key

from dask_memusage_exporter.health import Health
from dask_memusage_exporter.measure.bracket import Bracket

if TYPE_CHECKING:
    from distributed import Worker

    from dask_memusage_exporter.spans import Spans
    from dask_memusage_exporter.task_span import TaskSpan

#: Actors' calls that have raised and of which nobody has told yet.
_MOST_RAISED = 1_000


class WorkerSpans:
    """Starts and ends one worker's spans. A bracket of what has one holds it, as ``span``."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        #: Of actors' calls with a span that have raised, and whose error is on its way.
        self._raised: deque[Bracket] = deque()

    def start(self, spans: Spans, key: Key, is_task: bool) -> TaskSpan | None:
        """Start a span of a task, or of an actor's method, whose key is its name."""
        task = self._worker.state.tasks.get(key) if is_task else None
        prefix = str(key) if task is None else task.prefix
        return spans.start(key, prefix, task, self._worker.name)

    def enter(self, spans: Spans, key: Key, is_task: bool) -> TaskSpan | None:
        """Start one and make it this thread's own, before the task and its measurement."""
        try:
            span = self.start(spans, key, is_task)
            if span is not None:
                spans.enter(span)
            return span
        except Exception as error:
            spans.health.error("export", error)
            return None

    def enter_coroutine(self, bracket: Bracket | None) -> None:
        """Make a task's span current in its coroutine; runs in the coroutine's own context."""
        if bracket is not None and bracket.span is not None:
            with bracket.span.owner.health.guard("export"):
                bracket.span.owner.enter(bracket.span)

    def leave_coroutine(self, bracket: Bracket | None) -> None:
        """Take it off there."""
        if bracket is not None and bracket.span is not None:
            with bracket.span.owner.health.guard("export"):
                bracket.span.leave_coroutine()

    # -- actors' calls -------------------------------------------------------------------

    def end_call(self, bracket: Bracket) -> None:
        """End the span of an actor's call, which has no record."""
        with bracket.span.owner.health.guard("export"):
            sizes = bracket.rss, bracket.peak
            bracket.span.finish_call(self._worker.address, bracket.start, bracket.stop, *sizes)

    def take_off(self, bracket: Bracket, is_task: bool, health: Health) -> None:
        """Take a span off this thread, of what has ended there without a word."""
        if bracket.span is None:
            return
        with health.guard("export"):
            bracket.span.owner.clear()
            if is_task:
                bracket.span.drop()
            elif not bracket.span.done:
                # What it raised is told on the event loop, and may be on its way.
                bracket.stop = time()
                if len(self._raised) == _MOST_RAISED:  # the oldest makes room
                    self._raised.popleft().span.drop()
                    health.drop("span_export")
                self._raised.append(bracket)

    def fail_call(self, name: str | None, error: Any, standing: Iterable[Bracket]) -> None:
        """End the span of an actor's method that has raised on a thread: nobody tells of its end.

        Of those of its name the first: an actor's calls are told of in their order. Its bracket may
        still be among those that stand on threads, for the thread's next start to take off.
        """
        taken_off = [one for one in list(self._raised) if one.tag == name]
        dead = (one for one in standing if one.tag == name and not one.alive())
        for bracket in (*taken_off, *dead):
            if bracket.span is not None and not bracket.span.done:
                if bracket in taken_off:
                    self._raised.remove(bracket)
                else:
                    bracket.stop = time()
                bracket.span.fail(error)
                self.end_call(bracket)
                return

    def give_up_calls(self) -> None:
        """End the spans of those that have raised: nobody tells what any more."""
        while self._raised:
            self.end_call(self._raised.popleft())
