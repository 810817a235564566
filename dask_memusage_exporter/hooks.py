"""What Dask calls, task by task: here brackets are opened and closed. Every microsecond counts.

A task's own thread tells of its start and stop, by the ``seam``; the event loop tells of its
transitions, of which ``executions`` makes the record.

Covers: tasks and actors' methods on threads; code of a user's on the event loop that is no task.
Does not cover: tasks that have no thread (coroutines, process pools), whose brackets ``executions``
opens and closes at their transitions; how anything is measured (``measure.tracker``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dask.typing import Key

from dask_memusage_exporter import seam
from dask_memusage_exporter.executions import ENDS, Executions
from dask_memusage_exporter.measure.bracket import Bracket
from dask_memusage_exporter.reporter import Reporter
from dask_memusage_exporter.traffic import Traffic
from dask_memusage_exporter.worker_spans import WorkerSpans

if TYPE_CHECKING:
    from distributed import Worker

    from dask_memusage_exporter.process import Process

#: States in which a task runs, or ran until just now.
_RUNNING = frozenset({"executing", "long-running", "cancelled", "resumed"})


class Hooks:
    """The hooks of one worker. None raises anything of ours, and none waits."""

    def __init__(
        self,
        worker: Worker,
        *,
        traffic: Traffic,
        reporter: Reporter,
        spans: WorkerSpans,
        executions: Executions,
    ) -> None:
        self._worker, self._traffic = worker, traffic
        self._spans, self._executions = spans, executions
        # What every task calls is looked up once.
        self._runs, self._enter_span = reporter.runs, spans.enter
        self._begins, self._ends = executions.begins, executions.ends
        #: Closed brackets whose transition is on its way.
        self._closed = executions.closed
        #: Whose part the worker is; None: nothing is measured.
        self.measuring: Process | None = None
        #: Open brackets by thread, who measures, and whether they are tasks' (or actor calls').
        self._by_thread: dict[int, tuple[Bracket, Process, bool]] = {}

    def on_threads(self) -> list[Bracket]:
        """Return the brackets that are open on threads. From any thread."""
        return [opened[0] for opened in list(self._by_thread.values())]

    # -- seam.Listener: on the task's own thread -----------------------------------------

    def on_start(self, thread: int, key: Key) -> None:
        """Open a bracket for a task or an actor's method."""
        measuring = self.measuring
        if thread in self._by_thread:
            self._take_off(thread)
        if measuring is None:
            return
        began = perf_counter()
        self._executions.told = True
        span = None
        try:
            worker = self._worker
            # Actors' methods are no tasks: their entry is a name, and it may outlive the call.
            is_task = key in worker.active_keys
            spans = measuring.telemetry.spans
            if spans is not None:
                span = self._enter_span(spans, key, is_task)
            bracket = measuring.open(
                thread,
                (lambda: key in worker.active_keys or self.measuring is not measuring)
                if is_task
                else _actor_call(thread),
            )
            if bracket is not None:
                bracket.tag, bracket.span = key, span
                self._by_thread[thread] = (bracket, measuring, is_task)
                if is_task:
                    self._runs(key, True)
                bracket.opened = opened = perf_counter()
                bracket.start_seconds = opened - began
                span = None  # it is left when the task has ended
        except Exception as error:
            measuring.health.error("start", error)
        if span is not None:
            span.leave()
            span.drop()

    def _take_off(self, thread: int) -> None:
        """Take off what has ended on this thread without a word: an actor's method that raised."""
        bracket, measuring, is_task = self._by_thread.pop(thread)
        with measuring.health.guard("start"):
            measuring.tracker.abandon(bracket)
        self._spans.take_off(bracket, is_task, measuring.health)

    def on_stop(self, thread: int, key: Key) -> None:
        """Close the bracket; the event loop makes the record of it."""
        opened = self._by_thread.pop(thread, None)
        if opened is None:
            return
        began = perf_counter()
        bracket, measuring, is_task = opened
        bracket.seconds = began - bracket.opened
        waits = False  # for its transition
        try:
            if is_task:
                self._runs(key, False)
            if measuring.shut(bracket) and is_task and self.measuring is measuring:
                self._closed[key] = bracket
                waits = True
        except Exception as error:
            measuring.health.error("stop", error)
        if bracket.span is not None:
            with measuring.health.guard("export"):
                bracket.span.leave()
                if is_task and not waits:
                    bracket.span.drop()
        bracket.stop_seconds = perf_counter() - began
        if not is_task:
            measuring.spent(bracket)
            if bracket.span is not None:
                self._spans.end_call(bracket)

    # -- code of a user's on the event loop ----------------------------------------------

    @contextmanager
    def on_loop(self, actor_call: str | None = None) -> Iterator[Callable[[Any], None]]:
        """Hold a bracket open while something runs that is no task: it overlaps, and no more.

        An actor's method has a span too; what it raised is to be told to what is yielded.
        """
        measuring, bracket, span = self.measuring, None, None
        if measuring is not None:
            with measuring.health.guard("start"):
                spans = measuring.telemetry.spans
                if spans is not None and actor_call is not None:
                    span = self._enter_span(spans, actor_call, False)
                bracket = measuring.open(None, lambda: True)
        try:
            yield lambda error: None if span is None else span.fail(error)
        finally:
            if span is not None:
                span.leave()
            if measuring is not None and bracket is not None:
                with measuring.health.guard("stop"):
                    measuring.shut(bracket)
                    if span is not None:
                        span.finish_call(self._worker.address, bracket.start, bracket.stop)
            if span is not None:
                span.drop()  # where it was not measured; an ended one stays as it is

    def on_actor_error(self, name: str | None, error: Any) -> None:
        """Hear what an actor's method has raised on a thread, where its bracket may still stand."""
        self._spans.fail_call(name, error, self.on_threads())

    # -- WorkerPlugin.transition: on the event loop --------------------------------------

    def transition(self, key: Key, start: str, finish: str, **_: Any) -> None:
        """Follow the task's states; make the record when an execution has ended."""
        measuring = self.measuring
        if measuring is None:
            return
        if finish == "memory" and start != "cancelled":
            self._traffic.insert(key)
        if finish == "executing":
            with measuring.health.guard("start"):
                self._begins(measuring, key)
        elif start in _RUNNING and finish in ENDS:
            with measuring.health.guard("record"):
                self._ends(measuring, key, start, finish)
        elif finish == "memory":
            self._traffic.arrive(key)


def _actor_call(thread: int) -> Callable[[], bool]:
    """Return what tells whether the call that starts on this thread still runs."""
    code = seam.caller("dask_memusage_exporter")
    return lambda: seam.runs(thread, code)
