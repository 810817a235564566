"""From the transitions of a task to its record: all on the worker's event loop.

A task is looked at before it starts; its thread closes its bracket, or here it is closed where it
has no thread; what was measured and what Dask knows of the task become the record that the reporter
takes.

Covers: executions that end in order, err, are cancelled or rescheduled; brackets of tasks that have
no thread of their own; threads that turn out to tell nothing.
Does not cover: brackets on threads (``hooks``), and what of a window is the task's own
(``measure.tracker``).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from dask.typing import Key

from dask_memusage_exporter import seam
from dask_memusage_exporter.measure.bracket import SHORT, Bracket, Look
from dask_memusage_exporter.measure.scopes import FLOOR_BYTES
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.reporter import Reporter
from dask_memusage_exporter.traffic import Traffic
from dask_memusage_exporter.worker_spans import WorkerSpans

if TYPE_CHECKING:
    from distributed import Worker
    from distributed.worker_state_machine import TaskState

    from dask_memusage_exporter.process import Process

logger = logging.getLogger("distributed.worker.memusage")

#: Transitions that end an execution. "released" is none: a task that is asked to be released while
#: it runs goes on, as "cancelled".
ENDS = {"memory": "finished", "error": "erred", "rescheduled": "rescheduled"}

#: So many prefixes are remembered to have short tasks.
_MOST_SHORT = 1_000

#: Brackets whose transition never came; more than this is a defect of ours, and bounded.
_MOST_CLOSED = 10_000


class Executions:
    """One worker's executions, from their begin to their record."""

    def __init__(
        self, worker: Worker, *, traffic: Traffic, reporter: Reporter, spans: WorkerSpans
    ) -> None:
        self._worker, self._traffic = worker, traffic
        self._reporter, self._spans = reporter, spans
        #: Closed brackets whose transition is on its way; threads put them there.
        self.closed: dict[Key, Bracket] = {}
        #: Whether a thread has ever told of a start.
        self.told = False
        #: Why threads cannot tell; None: they do.
        self.seam_fault: str | None = None
        #: What runs with no thread that tells of it.
        self.without_thread: dict[Key, Bracket | None] = {}
        #: What surrounded each task before it started, and what had come from the scheduler.
        self._before: dict[Key, tuple[Look, int]] = {}
        #: Prefixes whose last task was short and took little.
        self._short: set[str] = set()

    def do_without_threads(self, fault: str) -> None:
        """Measure from transitions alone from now on, and say why."""
        self.seam_fault = fault
        logger.warning(
            "dask-memusage: Worker.active_threads cannot be used in this version of distributed "
            "(%s). Tasks are measured from their transitions, all as scope shared",
            fault,
        )

    def give_up(self, measuring: Process) -> None:
        """Forget all that runs: nothing is measured any more."""
        # Those on threads of their own are closed there: until then they do overlap others.
        for bracket in self.without_thread.values():
            if bracket is not None:
                measuring.tracker.abandon(bracket)
        for bracket in (*self.without_thread.values(), *self.closed.values()):
            if bracket is not None and bracket.span is not None:
                bracket.span.drop()
        for open_or_closed in (self.without_thread, self._before, self.closed):
            open_or_closed.clear()

    # -- the begin -----------------------------------------------------------------------

    def begins(self, measuring: Process, key: Key) -> None:
        """Look before a task; open a bracket here for what has no thread of its own."""
        task = self._worker.state.tasks[key]
        self._before[key] = measuring.look_before(short=task.prefix in self._short)
        bare = self.seam_fault is not None or not self._has_thread(task)
        self._reporter.begins(key, runs=bare)
        if bare:
            brackets = self.without_thread
            brackets[key] = None  # it is asked from now on whether this one runs
            spans, span = measuring.telemetry.spans, None
            if spans is not None:
                with measuring.health.guard("export"):
                    span = self._spans.start(spans, key, True)
                    seam.listen_in_coroutines(self._worker, self._on_coroutine, self._off_coroutine)
            bracket = measuring.open(None, lambda: key in brackets)
            if bracket is not None:
                bracket.tag, bracket.span = key, span
            brackets[key] = bracket

    def _has_thread(self, task: TaskState) -> bool:
        if getattr(task.run_spec, "is_coro", False):
            return False
        name = (task.annotations or {}).get("executor", "default")
        executor = self._worker.executors.get(name)
        # distributed's own rule (Worker.execute): only these get active_threads. One that is not
        # there fails the task before it starts.
        return executor is None or "ThreadPoolExecutor" in str(type(executor))

    def _on_coroutine(self, key: Key) -> None:
        self._spans.enter_coroutine(self.without_thread.get(key))

    def _off_coroutine(self, key: Key) -> None:
        self._spans.leave_coroutine(self.without_thread.get(key))

    # -- the end -------------------------------------------------------------------------

    def ends(self, measuring: Process, key: Key, start: str, finish: str) -> None:
        """Make the record of an execution, now or later, and give it to the reporter."""
        before = self._before.pop(key, None)
        bracket = self.closed.pop(key, None)
        bare = self.without_thread.get(key)
        if bare is not None and measuring.shut(bare) and self._has_run(key, bare):
            bracket = bracket or bare
        self.without_thread.pop(key, None)  # not before: it would be taken for abandoned
        if bare is not None and bare is not bracket and bare.span is not None:
            bare.span.drop()
        self._reporter.ends(key)
        if before is None:
            if bracket is None and finish == "memory":
                self._traffic.arrive(key)  # came over while it was wanted here
            elif bracket is not None and bracket.span is not None:
                bracket.span.drop()  # it ran here, and measuring ended and began again meanwhile
            return
        if bracket is None:
            if finish == "memory":
                measuring.health.drop("invalid")
                if not self.told and self.seam_fault is None:
                    self.do_without_threads("a task ended and none has ever been told of")
            return
        status = "cancelled" if start == "cancelled" else ENDS[finish]
        task = self._worker.state.tasks.get(key)
        if bracket.span is not None and status == "erred" and task is not None:
            error = getattr(task.exception, "data", None)
            bracket.span.fail(error, task.exception_text, task.traceback_text)
        record = partial(self._record, measuring, bracket, before, _facts(key, task, status))
        if bracket.uneventful and not self._reporter.rows:
            self._reporter.report_later(record)
        else:
            made = record()
            with measuring.health.guard("send"):
                self._reporter.report(made)
        if task is not None:
            self._learn(task.prefix, bracket)
        while len(self.closed) > _MOST_CLOSED:
            self._give_up_oldest(measuring)

    def _has_run(self, key: Key, bracket: Bracket) -> bool:
        """Return whether a task got beyond reading its inputs, which may fail."""
        task = self._worker.state.tasks.get(key)
        return task is None or (task.start_time or 0.0) >= bracket.start

    def _record(
        self,
        measuring: Process,
        bracket: Bracket,
        before: tuple[Look, int],
        facts: tuple[Any, ...],
    ) -> TaskMemory:
        measuring.spent(bracket)
        key, prefix, *rest = facts
        try:
            window = measuring.settle(bracket, before)
        except Exception:
            if bracket.span is not None:
                bracket.span.drop()
            raise
        record = TaskMemory(key, prefix, self._worker.address, *window, *rest)
        if bracket.span is not None:
            bracket.span.finish(record, self._reporter.exemplify)
        return record

    def _learn(self, prefix: str, bracket: Bracket) -> None:
        """Remember whether what surrounds them matters for tasks of this kind."""
        if bracket.seconds >= SHORT or bracket.peak - bracket.rss > FLOOR_BYTES:
            self._short.discard(prefix)
        elif len(self._short) < _MOST_SHORT:
            self._short.add(prefix)

    def _give_up_oldest(self, measuring: Process) -> None:
        lost = next(iter(self.closed))
        given_up = self.closed.pop(lost)
        if given_up.span is not None:
            given_up.span.drop()
        self._before.pop(lost, None)
        self._reporter.ends(lost)
        measuring.health.drop("invalid")


def _facts(key: Key, task: TaskState | None, status: str) -> tuple[Any, ...]:
    """Return what a record says of a task beside its memory, in the record's order."""
    if task is None:
        return key, "", 0, None, status, None
    inputs = task.dependencies
    return (
        key,
        task.prefix,
        sum(dependency.nbytes or 0 for dependency in inputs) if inputs else 0,
        task.nbytes if status == "finished" else None,
        status,
        task.span_id,
    )
