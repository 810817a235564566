"""The worker's side: wires seam, tracker and records together.

Covers: every execution that starts on this worker, on its own thread or not; what else the worker
moves meanwhile; telling the scheduler, where it listens, by its reporter.
Does not cover: tasks that were running before us, and tasks that fail before they start (an
unknown executor, inputs that cannot be read back): nothing of theirs ran.

The state lives in ``worker.extensions["memusage"]`` and not in the plugin: ``Worker.plugin_add``
tears a plugin of the same name down and replaces it, and running tasks must keep their start.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from time import perf_counter, time
from typing import TYPE_CHECKING, Any

from dask.typing import Key

from dask_memusage_exporter import http, process, providers, seam
from dask_memusage_exporter.bootstrap import Bootstrap, ByValue
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.measure import threads
from dask_memusage_exporter.measure.bracket import SHORT, Bracket, Look
from dask_memusage_exporter.measure.scopes import FLOOR_BYTES
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.reporter import Reporter
from dask_memusage_exporter.traffic import Traffic

if TYPE_CHECKING:
    from distributed import Worker
    from distributed.worker_state_machine import TaskState

    from dask_memusage_exporter.spans import Spans, TaskSpan

logger = logging.getLogger("distributed.worker.memusage")

EXTENSION = "memusage"

#: States in which a task runs, or ran until just now.
_RUNNING = frozenset({"executing", "long-running", "cancelled", "resumed"})
#: Transitions out of them that end an execution. "released" is none: a task that is asked to be
#: released while it runs goes on, as "cancelled".
_ENDS = {"memory": "finished", "error": "erred", "rescheduled": "rescheduled"}

#: So many prefixes are remembered to have short tasks.
_MOST_SHORT = 1_000

#: Seconds for all that we do when a worker closes; 2 are promised, and a busy machine needs some.
_CLOSING = 1.8
#: Actors' calls that have raised and of which nobody has told yet.
_MOST_RAISED = 1_000

#: Brackets whose transition never came; more than this is a defect of ours, and bounded.
_MOST_CLOSED = 10_000


class WorkerAgent:
    """Measures the tasks of one worker. Made by :func:`attach`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.traffic = Traffic(worker)
        #: Tells the scheduler; see :class:`reporter.Reporter`.
        self.reporter = Reporter(worker)
        #: Whether a plugin stands for us on the worker.
        self._owned = False
        #: Whether our metrics have their page on the worker's HTTP server, which stays.
        self._has_page = False
        self._process: process.Process | None = None
        #: Open brackets by thread, who measures, and whether they are tasks' (or actor calls').
        self._by_thread: dict[int, tuple[Bracket, process.Process, bool]] = {}
        #: Whether the seam has ever told of a start.
        self._told = False
        #: Closed brackets whose transition is on its way.
        self._closed: dict[Key, Bracket] = {}
        self._without_thread: dict[Key, Bracket | None] = {}
        #: Of actors' calls with a span that have raised, and whose error is on its way.
        self._raised: deque[Bracket] = deque()
        #: What surrounded each task before it started, and what had come from the scheduler.
        self._before: dict[Key, tuple[Look, int]] = {}
        #: Prefixes whose last task was short and took little.
        self._short: set[str] = set()
        self._seam_fault: str | None = seam.install(worker, self)
        if self._seam_fault is not None:
            self._say_fault()
        seam.listen_on_loop(worker, self.on_loop, self.on_actor_error)

    # -- coming and going ----------------------------------------------------------------

    def activate(self, options: Mapping[str, Any]) -> None:
        """Begin to measure, or go on with other options.

        Parameters
        ----------
        options
            What the scheduler has said, by the bootstrap: ``settings`` (its explicit settings),
            ``listens`` (its id, if it takes what the reporter sends) and ``rows`` (whether it wants
            single records too). Unknown ones are ignored: its version may be newer than ours.

        Raises
        ------
        ConfigError
            A setting is wrong.
        """
        first = self._process is None
        settings = (
            Settings.load(options.get("settings")) if first or "settings" in options else None
        )
        self._owned = True
        if settings is not None:
            process.join(self, settings)
        if self._process is not None:
            self.reporter.listen(options, self._process)
            if not self._has_page:
                self._has_page = True
                with self._process.health.guard("render"):
                    http.add_metrics(self.worker, process.here)
        self.worker.metrics[EXTENSION] = self._heartbeat

    async def introduction(self) -> None:
        """Wait until the scheduler will hear of this worker, whatever its first task does."""
        await self.reporter.introduction()

    def deactivate(self) -> None:
        """Stop measuring until activated again. What runs goes on unmeasured; counters stand."""
        measuring, self._process = self._process, None
        if measuring is not None:
            # Those on threads of their own are closed there: until then they do overlap others.
            for bracket in self._without_thread.values():
                if bracket is not None:
                    measuring.tracker.abandon(bracket)
            for bracket in (*self._without_thread.values(), *self._closed.values()):
                if bracket is not None and bracket.span is not None:
                    bracket.span.drop()
            for open_or_closed in (self._without_thread, self._before, self._closed):
                open_or_closed.clear()
            self.reporter.end_all()
            while self._raised:  # nobody tells what they raised any more
                self._end_call(self._raised.popleft())

    def release(self) -> None:
        """Stop measuring unless somebody activates again before the event loop's next round.

        ``Worker.plugin_add`` tears the old plugin down and sets the new one up in one round.
        """
        self._owned = False
        self.worker.loop.add_callback(lambda: None if self._owned else self.deactivate())

    async def close(self) -> None:
        """Let everything go; ``Worker.close`` calls this on all extensions."""
        began = perf_counter()
        self.deactivate()
        self.reporter.flush()
        # Before the goodbye, which tells the scheduler what was lost in it.
        await process.send_last(self)
        await self.reporter.goodbye(began + _CLOSING - perf_counter())
        process.leave(self)
        logger.info("dask-memusage: closed in %.2f s", perf_counter() - began)

    def _heartbeat(self, _: Worker) -> dict[str, Any]:
        from dask_memusage_exporter import __version__

        measuring = self._process
        if measuring is not None:
            measuring.telemetry.refresh()
        on_threads = [opened[0] for opened in list(self._by_thread.values())]
        return {
            "source": measuring.source_name if measuring is not None else "missing",
            "version": __version__,
            "running": self.reporter.running([*on_threads, *self._without_thread.values()]),
        }

    def _watch_offload(self) -> None:
        """Take the clock of the thread on which distributed (de)serialises large messages."""
        measuring = self._process
        offload = self.worker.executors.get("offload")
        if measuring is not None and isinstance(offload, Executor):
            offload.submit(get_ident).add_done_callback(
                lambda done: measuring.tracker.add_witness(
                    threads.clock_of(done.result()), "offload"
                )
            )

    # -- process.Member ------------------------------------------------------------------

    def measured_by(self, measuring: process.Process) -> None:
        """Hear whose part this worker is from now on."""
        if self._owned:
            self._process = measuring
            self._watch_offload()

    def identity(self) -> dict[str, str]:
        """Return what identifies the worker: attributes of OpenTelemetry's."""
        address = getattr(self.worker, "_address", None) or ""
        if address.startswith("inproc:"):
            return providers.identity("worker")  # one of several in its process, for all we know
        return providers.identity("worker", name=str(self.worker.name), address=address)

    def memory_limit(self) -> int | None:
        """Return the worker's memory limit in bytes, or None."""
        return self.worker.memory_manager.memory_limit

    @property
    def why(self) -> str | None:
        """Why peaks come from where they do, for people; None while nothing is measured."""
        return None if self._process is None else self._process.why

    @property
    def scraped(self) -> float | None:
        """When ``/metrics`` of this process was last read, in seconds since the epoch."""
        return None if self._process is None else self._process.scraped

    @property
    def heard(self) -> bool:
        """Whether the scheduler shows everything for the whole cluster."""
        return self.reporter.heard

    def flush(self) -> None:
        """Add what has been counted to the process's aggregate, and tell the scheduler."""
        self.reporter.flush()

    def note(self, open_brackets: Iterable[Bracket]) -> None:
        """Note in the flight file how high tasks are."""
        self.reporter.note(open_brackets)

    # -- seam.Listener: on the task's own thread -----------------------------------------

    def on_start(self, thread: int, key: Key) -> None:
        """Open a bracket for a task or an actor's method."""
        measuring = self._process
        if thread in self._by_thread:
            self._take_off(thread)
        if measuring is None:
            return
        began = perf_counter()
        self._told = True
        span = None
        try:
            worker = self.worker
            # Actors' methods are no tasks: their entry is a name, and it may outlive the call.
            is_task = key in worker.active_keys
            spans = measuring.telemetry.spans
            if spans is not None:
                span = self._enter_span(spans, key, is_task)
            bracket = measuring.open(
                thread,
                (lambda: key in worker.active_keys or self._process is not measuring)
                if is_task
                else _actor_call(thread),
            )
            if bracket is not None:
                bracket.tag, bracket.span = key, span
                self._by_thread[thread] = (bracket, measuring, is_task)
                if is_task:
                    self.reporter.runs(key, True)
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
        measuring.tracker.abandon(bracket)
        if bracket.span is None:
            return
        with measuring.health.guard("export"):
            bracket.span.owner.clear()
            if is_task:
                bracket.span.drop()
            elif not bracket.span.done:
                # What it raised is told on the event loop, and may be on its way.
                bracket.stop = time()
                if len(self._raised) == _MOST_RAISED:  # the oldest makes room
                    self._raised.popleft().span.drop()
                    measuring.health.drop("span_export")
                self._raised.append(bracket)

    def _enter_span(self, spans: Spans, key: Key, is_task: bool) -> TaskSpan | None:
        """Start a span and make it this thread's own, before the task and its measurement."""
        try:
            span = self._start_span(spans, key, is_task)
            if span is not None:
                spans.enter(span)
            return span
        except Exception as error:
            spans.health.error("export", error)
            return None

    def _start_span(self, spans: Spans, key: Key, is_task: bool) -> TaskSpan | None:
        task = self.worker.state.tasks.get(key) if is_task else None
        return spans.start(key, str(key) if task is None else task.prefix, task, self.worker.name)

    def on_stop(self, thread: int, key: Key) -> None:
        """Close the bracket; the event loop makes the record of it."""
        opened = self._by_thread.pop(thread, None)
        if opened is None:
            return
        began = perf_counter()
        bracket, measuring, is_task = opened
        bracket.seconds = began - bracket.opened
        try:
            if is_task:
                self.reporter.runs(key, False)
            if measuring.shut(bracket) and is_task and self._process is measuring:
                self._closed[key] = bracket
        except Exception as error:
            measuring.health.error("stop", error)
        if bracket.span is not None:
            with measuring.health.guard("export"):
                bracket.span.leave()
        bracket.stop_seconds = perf_counter() - began
        if not is_task:
            measuring.spent(bracket)
            if bracket.span is not None:
                self._end_call(bracket)

    # -- code of a user's on the event loop ----------------------------------------------

    @contextmanager
    def on_loop(self, actor_call: str | None = None) -> Iterator[Callable[[Any], None]]:
        """Hold a bracket open while something runs that is no task: it overlaps, and no more.

        An actor's method has a span too; what it raised is to be told to what is yielded.
        """
        measuring, bracket, span = self._process, None, None
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
                        span.finish_call(self.worker.address, bracket.start, bracket.stop)

    def on_actor_error(self, name: str | None, error: Any) -> None:
        """End the span of an actor's method that has raised on a thread: nobody tells of its end.

        Of those of its name the first: an actor's calls are told of in their order. Its bracket
        may still stand, for the thread's next start to take off.
        """
        taken_off = [one for one in list(self._raised) if one.tag == name]
        standing = (opened[0] for opened in list(self._by_thread.values()))
        dead = (one for one in standing if one.tag == name and not one.alive())
        for bracket in (*taken_off, *dead):
            if bracket.span is not None and not bracket.span.done:
                if bracket in taken_off:
                    self._raised.remove(bracket)
                else:
                    bracket.stop = time()
                bracket.span.fail(error)
                self._end_call(bracket)
                return

    def _end_call(self, bracket: Bracket) -> None:
        """End the span of an actor's call, which has no record."""
        with bracket.span.owner.health.guard("export"):
            sizes = bracket.rss, bracket.peak
            bracket.span.finish_call(self.worker.address, bracket.start, bracket.stop, *sizes)

    # -- WorkerPlugin.transition: on the event loop --------------------------------------

    def transition(self, key: Key, start: str, finish: str, **_: Any) -> None:
        """Follow the task's states; make the record when an execution has ended."""
        measuring = self._process
        if measuring is None:
            return
        if finish == "memory" and start != "cancelled":
            self.traffic.inserted += self._nbytes(key)
        if finish == "executing":
            with measuring.health.guard("start"):
                self._begins(measuring, key)
        elif start in _RUNNING and finish in _ENDS:
            with measuring.health.guard("record"):
                self._ends(measuring, key, start, finish)
        elif finish == "memory":
            self.traffic.arrived += self._nbytes(key)

    def _begins(self, measuring: process.Process, key: Key) -> None:
        """Look before a task; open a bracket here for what has no thread of its own."""
        task = self.worker.state.tasks[key]
        self._before[key] = measuring.look_before(short=task.prefix in self._short)
        bare = self._seam_fault is not None or not self._has_thread(task)
        self.reporter.begins(key, runs=bare)
        if bare:
            brackets = self._without_thread
            brackets[key] = None  # it is asked from now on whether this one runs
            spans, span = measuring.telemetry.spans, None
            if spans is not None:
                with measuring.health.guard("export"):
                    span = self._start_span(spans, key, True)
                    seam.listen_in_coroutines(self.worker, self.on_coroutine, self.off_coroutine)
            bracket = measuring.open(None, lambda: key in brackets)
            if bracket is not None:
                bracket.tag, bracket.span = key, span
            brackets[key] = bracket

    def on_coroutine(self, key: Key) -> None:
        """Make a task's span current in its coroutine; runs in the coroutine's own context."""
        bracket = self._without_thread.get(key)
        if bracket is not None and bracket.span is not None:
            with bracket.span.owner.health.guard("export"):
                bracket.span.owner.enter(bracket.span)

    def off_coroutine(self, key: Key) -> None:
        """Take it off there."""
        bracket = self._without_thread.get(key)
        if bracket is not None and bracket.span is not None:
            with bracket.span.owner.health.guard("export"):
                bracket.span.leave_coroutine()

    def _has_thread(self, task: TaskState) -> bool:
        if getattr(task.run_spec, "is_coro", False):
            return False
        name = (task.annotations or {}).get("executor", "default")
        executor = self.worker.executors.get(name)
        # distributed's own rule (Worker.execute): only these get active_threads. One that is not
        # there fails the task before it starts.
        return executor is None or "ThreadPoolExecutor" in str(type(executor))

    def _ends(self, measuring: process.Process, key: Key, start: str, finish: str) -> None:
        before = self._before.pop(key, None)
        bracket = self._closed.pop(key, None)
        bare = self._without_thread.get(key)
        if bare is not None and measuring.shut(bare) and self._has_run(key, bare):
            bracket = bracket or bare
        self._without_thread.pop(key, None)  # not before: it would be taken for abandoned
        if bare is not None and bare is not bracket and bare.span is not None:
            bare.span.drop()
        self.reporter.ends(key)
        if bracket is None or before is None:
            if finish == "memory" and before is None:
                self.traffic.arrived += self._nbytes(key)  # came over while it was wanted here
            elif finish == "memory":
                measuring.health.drop("invalid")
                if not self._told and self._seam_fault is None:
                    self._seam_fault = "a task ended and none has ever been told of"
                    self._say_fault()
            return
        status = "cancelled" if start == "cancelled" else _ENDS[finish]
        task = self.worker.state.tasks.get(key)
        if bracket.span is not None and status == "erred" and task is not None:
            error = getattr(task.exception, "data", None)
            bracket.span.fail(error, task.exception_text, task.traceback_text)
        record = partial(self._record, measuring, bracket, before, _facts(key, task, status))
        if bracket.uneventful and not self.reporter.rows:
            self.reporter.report_later(record)
        else:
            made = record()
            with measuring.health.guard("send"):
                self.reporter.report(made)
        if task is not None:
            self._learn(task.prefix, bracket)
        while len(self._closed) > _MOST_CLOSED:
            lost = next(iter(self._closed))
            given_up = self._closed.pop(lost)
            if given_up.span is not None:
                given_up.span.drop()
            self._before.pop(lost, None)
            self.reporter.ends(lost)
            measuring.health.drop("invalid")

    def _learn(self, prefix: str, bracket: Bracket) -> None:
        """Remember whether what surrounds them matters for tasks of this kind."""
        if bracket.seconds >= SHORT or bracket.peak - bracket.rss > FLOOR_BYTES:
            self._short.discard(prefix)
        elif len(self._short) < _MOST_SHORT:
            self._short.add(prefix)

    def _has_run(self, key: Key, bracket: Bracket) -> bool:
        """Return whether a task got beyond reading its inputs, which may fail."""
        task = self.worker.state.tasks.get(key)
        return task is None or (task.start_time or 0.0) >= bracket.start

    def _record(
        self,
        measuring: process.Process,
        bracket: Bracket,
        before: tuple[Look, int],
        facts: tuple[Any, ...],
    ) -> TaskMemory:
        measuring.spent(bracket)
        key, prefix, *rest = facts
        window = measuring.settle(bracket, before)
        record = TaskMemory(key, prefix, self.worker.address, *window, *rest)
        if bracket.span is not None:
            bracket.span.finish(record, self.reporter.exemplify)
        return record

    def _nbytes(self, key: Key) -> int:
        task = self.worker.state.tasks.get(key)
        return 0 if task is None else task.nbytes or 0

    def _say_fault(self) -> None:
        logger.warning(
            "dask-memusage: Worker.active_threads cannot be used in this version of distributed "
            "(%s). Tasks are measured from their transitions, all as scope shared",
            self._seam_fault,
        )


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


def _actor_call(thread: int) -> Callable[[], bool]:
    """Return what tells whether the call that starts on this thread still runs."""
    code = seam.caller("dask_memusage_exporter")
    return lambda: seam.runs(thread, code)


def attach(worker: Worker, options: Mapping[str, Any]) -> WorkerAgent:
    """Begin to measure on a worker, or adopt what measures there already."""
    agent = worker.extensions.get(EXTENSION)
    if not isinstance(agent, WorkerAgent):
        agent = worker.extensions[EXTENSION] = WorkerAgent(worker)
    agent.activate(options)
    return agent


class MemusageWorkerPlugin(Bootstrap):
    """Measures the tasks of a worker: ``client.register_plugin(MemusageWorkerPlugin())``.

    Where the scheduler's plugin is registered too this one is not needed, and does nothing. It
    travels by value: a worker without the package joins, and runs unmeasured.
    """

    #: What is registered under this name stays: it may be the scheduler's, which knows more.
    idempotent = True

    def __init__(self) -> None:
        super().__init__({})

    def __reduce__(self) -> Any:
        return ByValue(self.options).__reduce__()
