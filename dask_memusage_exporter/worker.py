"""The worker's side: wires seam, tracker and records together.

Covers: every execution that starts on this worker, on its own thread or not; what else the worker
moves meanwhile; sending records to the scheduler where somebody listens.
Does not cover: tasks that were running before us, and tasks that fail before they start (an
unknown executor, inputs that cannot be read back): nothing of theirs ran.

The state lives in ``worker.extensions["memusage"]`` and not in the plugin: ``Worker.plugin_add``
tears a plugin of the same name down and replaces it, and running tasks must keep their start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Executor
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

from dask.typing import Key

from dask_memusage_exporter import process, seam
from dask_memusage_exporter.bootstrap import Bootstrap, ByValue
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.measure import threads
from dask_memusage_exporter.measure.tracker import Bracket, Window
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.traffic import Traffic

if TYPE_CHECKING:
    from distributed import Worker

logger = logging.getLogger(__name__)

EXTENSION = "memusage"

#: The operation under which records travel; the scheduler must know it (see ``scheduler``).
RECORDS_OP = "memusage-records"

#: States in which a task runs, or ran until just now.
_RUNNING = frozenset({"executing", "long-running", "cancelled", "resumed"})
#: Transitions out of them that end an execution.
_ENDS = {"memory": "finished", "error": "erred", "rescheduled": "rescheduled", "released": "cancelled"}

#: Windows whose transition never came; more than this is a defect of ours, and bounded.
_MOST_WINDOWS = 10_000


class _Running(NamedTuple):
    key: Key
    bracket: Bracket | None
    is_task: bool


class WorkerAgent:
    """Measures the tasks of one worker. Made by :func:`attach`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.traffic = Traffic(worker)
        #: Whether the scheduler listens for records.
        self.rows = False
        #: Whether a plugin stands for us on the worker.
        self._owned = False
        self._process: process.Process | None = None
        self._by_thread: dict[int, _Running] = {}
        self._windows: dict[Key, Window] = {}
        self._without_thread: dict[Key, Bracket | None] = {}
        #: Tasks that the seam must tell of before they end.
        self._expected: set[Key] = set()
        self._seam_fault: str | None = seam.install(worker, self)
        if self._seam_fault is not None:
            self._say_fault()

    # -- coming and going ----------------------------------------------------------------

    def activate(self, options: Mapping[str, Any]) -> None:
        """Begin to measure, or go on with other options.

        Parameters
        ----------
        options
            What the scheduler has said, by the bootstrap: ``settings`` (its explicit settings)
            and ``rows`` (whether it listens for records). Unknown ones are ignored: its version may
            be newer than ours.

        Raises
        ------
        ConfigError
            A setting is wrong.
        """
        self._owned = True
        if "rows" in options:
            self.rows = bool(options["rows"])
        if self._process is None:
            self._process = process.join(self, Settings.load(options.get("settings")))
            self.worker.metrics[EXTENSION] = self._heartbeat
            self._watch_offload()

    def deactivate(self) -> None:
        """Stop measuring. What runs goes on unmeasured; our series go with the last worker."""
        if self._process is not None:
            self._process = None
            self.worker.metrics.pop(EXTENSION, None)
            self._without_thread.clear()
            self._expected.clear()
            process.leave(self)

    def release(self) -> None:
        """Stop measuring unless somebody activates again before the event loop's next round.

        ``Worker.plugin_add`` tears the old plugin down and sets the new one up in one round.
        """
        self._owned = False
        self.worker.loop.add_callback(lambda: None if self._owned else self.deactivate())

    def close(self) -> None:
        """Called by ``Worker.close`` on all extensions."""
        self.deactivate()

    def _heartbeat(self, worker: Worker) -> dict[str, str]:
        from dask_memusage_exporter import __version__

        measuring = self._process
        return {
            "source": measuring.source_name if measuring is not None else "missing",
            "version": __version__,
        }

    def _watch_offload(self) -> None:
        """Take the clock of the thread on which distributed (de)serialises large messages."""
        measuring = self._process
        offload = self.worker.executors.get("offload")
        if measuring is not None and isinstance(offload, Executor):
            offload.submit(threads.own_clock).add_done_callback(
                lambda done: measuring.tracker.add_witness(done.result(), "offload")
            )

    # -- process.Member ------------------------------------------------------------------

    def bytes_opening(self) -> int:
        """Return bytes moved so far, for a task's start."""
        return self.traffic.opening()

    def bytes_closing(self) -> int:
        """Return bytes moved so far, for a task's stop."""
        return self.traffic.closing()

    def memory_limit(self) -> int | None:
        """Return the worker's memory limit in bytes, or None."""
        return self.worker.memory_manager.memory_limit

    # -- seam.Listener: on the task's own thread -----------------------------------------

    def on_start(self, thread: int, key: Key, code: CodeType) -> None:
        """Open a bracket for a task or an actor's method."""
        measuring = self._process
        if measuring is None:
            return
        with measuring.health.guard("start"):
            left = self._by_thread.pop(thread, None)
            if left is not None and left.bracket is not None:
                measuring.tracker.abandon(left.bracket)
            active = self.worker.active_keys
            # Actors' methods are no tasks: their entry is a name, and it may outlive the call.
            is_task = key in active
            bracket = measuring.tracker.start(
                measuring.foreign_opening(),
                alive=(lambda: key in active) if is_task else (lambda: seam.runs(thread, code)),
            )
            self._by_thread[thread] = _Running(key, bracket, is_task)

    def on_stop(self, thread: int, key: Key) -> None:
        """Close the bracket; the event loop makes the record of it."""
        running = self._by_thread.pop(thread, None)
        measuring = self._process
        if measuring is None or running is None or running.bracket is None:
            return
        with measuring.health.guard("stop"):
            window = measuring.tracker.stop(running.bracket, measuring.foreign_closing)
            if window is not None and running.is_task:
                self._windows[key] = window

    # -- WorkerPlugin.transition: on the event loop --------------------------------------

    def transition(self, key: Key, start: str, finish: str, **_: Any) -> None:
        """Follow the task's states; make the record when an execution has ended."""
        measuring = self._process
        if measuring is None:
            return
        if finish == "executing":
            with measuring.health.guard("start"):
                self._begins(measuring, key)
        elif start in _RUNNING and finish in _ENDS:
            # Asked to be released while it runs: it goes on, as "cancelled".
            if finish != "released" or start not in ("executing", "long-running"):
                with measuring.health.guard("record"):
                    self._ends(measuring, key, start, finish)
        elif finish == "memory":
            self.traffic.arrived += self._nbytes(key)
        elif start == "memory":
            self.traffic.released += self._nbytes(key)

    def _begins(self, measuring: process.Process, key: Key) -> None:
        """Open a bracket for what will not run on a thread of its own here."""
        if self._seam_fault is None and self._has_thread(key):
            self._expected.add(key)
            return
        self._without_thread[key] = measuring.tracker.start(
            measuring.foreign_opening(), alive=lambda: True, own_thread=False
        )

    def _has_thread(self, key: Key) -> bool:
        task = self.worker.state.tasks[key]
        if getattr(task.run_spec, "is_coro", False):
            return False
        name = (task.annotations or {}).get("executor", "default")
        # distributed's own rule (Worker.execute): only these get active_threads.
        return "ThreadPoolExecutor" in str(type(self.worker.executors.get(name)))

    def _ends(self, measuring: process.Process, key: Key, start: str, finish: str) -> None:
        window = self._windows.pop(key, None)
        bracket = self._without_thread.pop(key, None)
        if bracket is not None:
            window = measuring.tracker.stop(bracket, measuring.foreign_closing)
        expected = key in self._expected
        self._expected.discard(key)
        if window is None:
            if finish == "memory" and expected:
                measuring.health.drop("invalid")
                if self._seam_fault is None:
                    self._seam_fault = "a task ended that it had not told of"
                    self._say_fault()
            elif finish == "memory":
                self.traffic.arrived += self._nbytes(key)  # came over while it was wanted here
            return
        record = self._record(key, window, "cancelled" if start == "cancelled" else _ENDS[finish])
        with measuring.health.guard("aggregate"):
            measuring.aggregate.observe(record)
        if self.rows:
            with measuring.health.guard("send"):
                self._send(measuring, record)
        while len(self._windows) > _MOST_WINDOWS:
            self._windows.pop(next(iter(self._windows)))
            measuring.health.drop("invalid")

    def _record(self, key: Key, window: Window, status: str) -> TaskMemory:
        task = self.worker.state.tasks.get(key)
        return TaskMemory(
            key=key,
            task_prefix=task.prefix if task is not None else "",
            worker=self.worker.address,
            start=window.start,
            stop=window.stop,
            start_bytes=window.start_bytes,
            peak_bytes=window.peak_bytes,
            growth_bytes=window.growth_bytes,
            scope=window.scope,
            reason=window.reason,
            reusable_bytes=window.reusable_bytes,
            foreign_bytes=window.foreign_bytes,
            concurrency=window.concurrency,
            input_bytes=None if task is None else sum(d.nbytes or 0 for d in task.dependencies),
            output_bytes=task.nbytes if task is not None and status == "finished" else None,
            status=status,
            span_id=None if task is None else task.span_id,
        )

    def _send(self, measuring: process.Process, record: TaskMemory) -> None:
        """Send a record ahead of the task-finished message, on the same ordered stream."""
        stream = self.worker.batched_stream
        if stream is None or stream.comm is None or stream.comm.closed():
            measuring.health.drop("disconnected")  # Worker.batched_send would say nothing
            return
        self.worker.batched_send({"op": RECORDS_OP, "rows": [tuple(record)]})

    def _nbytes(self, key: Key) -> int:
        task = self.worker.state.tasks.get(key)
        return 0 if task is None else task.nbytes or 0

    def _say_fault(self) -> None:
        logger.warning(
            "dask-memusage: Worker.active_threads cannot be used in this version of distributed "
            "(%s). Tasks are measured from their transitions, all as scope shared",
            self._seam_fault,
        )


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

    #: Where something of this name is registered it stays: it may be the scheduler's, which knows more.
    idempotent = True

    def __init__(self) -> None:
        super().__init__({})

    def __reduce__(self) -> Any:
        return ByValue(self.options).__reduce__()
