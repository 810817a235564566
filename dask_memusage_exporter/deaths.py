"""The scheduler's view of workers that die: which tasks were executing, how high, and why.

When a worker goes away without having said goodbye, its flight file tells what was running. Its
nanny reads it if it lives; else the next process that uses the same directory does and reports it
here. Where neither comes in time, the last heartbeat is what is known, and it is said to be that;
who comes later still tells the rest.

Covers: kills by the nanny, by the kernel, by a signal, crashes; with a nanny or without one.
Does not cover: which of the assigned tasks was executing where no file is ever read and the task
began after the last heartbeat. Then no task is blamed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dask.typing import Key
from dask.utils import key_split
from distributed.core import Status
from distributed.protocol.pickle import dumps
from distributed.protocol.serialize import Serialized, deserialize

from dask_memusage_exporter import flight
from dask_memusage_exporter.kills import Kill

if TYPE_CHECKING:
    from distributed import Scheduler
    from distributed.scheduler import WorkerState

logger = logging.getLogger("distributed.scheduler.memusage")

#: No cause: the nanny was told to end the process.
_ORDERED = "ordered"

#: Pauses in seconds between asking the nanny: the scheduler may notice a death before the process
#: is gone and its lock with it.
_ASKING = (0.0, 0.1, 0.3, 0.6, 1.0, 2.0)
#: How long to wait for the next process to report, in seconds.
_PATIENCE = 20.0
#: Processes that are remembered once settled, so that none is reported twice, and of those that
#: nobody has told of yet what was assigned to them.
_REMEMBERED, _UNTOLD = 10_000, 100


class Home(NamedTuple):
    """Where the flight file of a worker is."""

    directory: str
    incarnation: str
    nanny: str | None
    #: The scheduler's state of the worker, with its last heartbeat.
    state: WorkerState | None
    #: Where its peaks come from.
    source: str | None
    pid: int | None


class _Death:
    """A worker that has gone without a word."""

    def __init__(self, worker: str, home: Home, processing: set[Key]) -> None:
        self.worker = worker
        self.home = home
        self.processing = processing
        state = home.state
        said = {} if state is None else state.metrics.get("memusage") or {}
        self.running = [flight.Flying.of(one) for one in said.get("running", ())]
        self.time = time.time()
        #: Seconds since the last heartbeat.
        self.silence = 0.0 if state is None else max(0.0, self.time - state.last_seen)
        self.cause = "lost"
        #: Keys that have been named.
        self.named: set[Key] = set()
        #: Done with what was found; with None where it turns out that the end was in order.
        self.wreck: asyncio.Future[flight.Wreck | None] = asyncio.get_running_loop().create_future()

        #: When that was.
        self.told_at = self.time

    def tell(self, wreck: flight.Wreck | None) -> None:
        """Take what was found, the first time."""
        if not self.wreck.done():
            self.told_at = time.time()
            self.wreck.set_result(wreck)


class Deaths:
    """Watches workers come and go; calls back with each kill.

    Parameters
    ----------
    on_kill
        Called once for each task that was killed.
    on_end
        Called once for each process whose end is known, with its incarnation and how many records
        it had made, if that is known too.
    on_error
        Called with what went wrong in here.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        on_kill: Callable[[Kill], None],
        on_end: Callable[[str, int | None], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._scheduler = scheduler
        self._on_kill, self._on_end, self._on_error = on_kill, on_end, on_error
        self._homes: dict[str, Home] = {}
        self._open: dict[str, _Death] = {}
        self._early: OrderedDict[str, flight.Wreck] = OrderedDict()
        #: By incarnation: its death where no file of it has been read, and whether it is known how
        #: many records it had made. That is told once, whoever says it again.
        self._settled: OrderedDict[str, tuple[_Death | None, bool]] = OrderedDict()
        self._memory_kills: dict[str, tuple[float, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def hello(self, worker: str, home: Mapping[str, Any]) -> None:
        """Take note of a worker's flight file, and of what it found of others."""
        state = self._scheduler.workers.get(worker)
        nanny = home.get("nanny")
        if state is not None:  # else it has gone again already
            self._homes[worker] = Home(
                str(home.get("directory")),
                str(home.get("incarnation") or uuid.uuid4().hex),
                nanny,
                state,
                home.get("source"),
                home.get("pid"),
            )
            if nanny:
                self._spawn(self._ask(nanny, flight.watch_nanny))
        for raw in home.get("wrecks", ()):
            self._found(raw)

    @property
    def unsettled(self) -> frozenset[str]:
        """The incarnations of workers that have died and whose kills are not told yet."""
        return frozenset(self._open)

    def source_of(self, worker: str) -> str | None:
        """Return where a worker's peaks come from; None where it has not said."""
        home = self._homes.get(worker)
        return None if home is None else home.source

    def goodbye(
        self, worker: str, incarnation: str | None = None, observed: int | None = None
    ) -> None:
        """Take note that a worker ends in order, whether it says so itself or its nanny does."""
        home = self._homes.pop(worker, None)
        incarnation = incarnation or (None if home is None else home.incarnation)
        if incarnation is None:
            return
        death = self._open.get(incarnation)
        if death is not None:
            death.tell(None)
        self._in_order(incarnation, observed)

    def _in_order(self, incarnation: str, observed: int | None) -> None:
        early = self._early.pop(incarnation, None)
        if early is not None:
            observed = early.observed
        death, counted = self._settled.get(incarnation, (None, False))
        if not counted:
            self._remember(incarnation, death, counted=observed is not None)
            self._on_end(incarnation, observed)

    def _remember(self, incarnation: str, death: _Death | None, *, counted: bool) -> None:
        self._settled[incarnation] = death, counted
        while len(self._settled) > _REMEMBERED:
            self._settled.popitem(last=False)
        if death is not None:
            untold = [one for one, (untold, _) in self._settled.items() if untold is not None]
            for one in untold[:-_UNTOLD]:
                self._settled[one] = None, False

    def event(self, topic: str, message: Any) -> None:
        """Hear the scheduler's events (``SchedulerPlugin.log_event``)."""
        if self._closed or not isinstance(message, Mapping):
            return
        if topic == "worker-restart-memory":
            self._memory_kills[str(message.get("worker"))] = (
                time.time(),
                int(message.get("rss") or 0),
            )
        elif topic == "all" and message.get("action") == "remove-worker":
            worker = str(message.get("worker"))
            home = self._homes.pop(worker, None)
            if home is None:
                self._memory_kills.pop(worker, None)
                return
            retired = home.state is not None and home.state.status == Status.closing_gracefully
            if message.get("expected") or retired:
                self._in_order(home.incarnation, None)
                return
            death = _Death(worker, home, set(message.get("processing-tasks", ())))
            self._open[home.incarnation] = death
            self._spawn(self._settle(death))

    def close(self) -> None:
        """Ask and wait no longer: a scheduler that closes loses all its workers."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, nanny: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in a nanny; None where it cannot be reached."""
        try:
            answer = await asyncio.wait_for(
                self._scheduler.rpc(nanny).run(
                    function=dumps(function), args=dumps(arguments), kwargs=dumps({})
                ),
                timeout=3,
            )
        except (OSError, asyncio.TimeoutError):
            return None
        if answer["status"] != "OK":
            logger.debug("dask-memusage: nanny %s: %r", nanny, answer)
            return None
        result = answer["result"]
        # The scheduler's connections leave values as they came.
        if isinstance(result, Serialized):
            result = deserialize(result.header, result.frames)
        return result

    async def _settle(self, death: _Death) -> None:
        home = death.home
        try:
            wreck = await self._wreck_of(death)
            in_order = death.wreck.done() and wreck is None
            death.cause = await self._cause_of(death, wreck)
            if in_order or death.cause == _ORDERED:
                self._in_order(home.incarnation, None if wreck is None else wreck.observed)
            else:
                untold = death if wreck is None else None
                self._remember(home.incarnation, untold, counted=wreck is not None)
                self._report(death, wreck)
        except Exception as error:
            self._on_error(error)
        finally:
            self._open.pop(home.incarnation, None)

    async def _wreck_of(self, death: _Death) -> flight.Wreck | None:
        """Return what was found of a process; None where nobody has read its file in time."""
        home = death.home
        early = self._early.pop(home.incarnation, None)
        if early is not None:
            death.tell(early)
        for pause in _ASKING if home.nanny else ():
            if death.wreck.done():
                break
            await asyncio.sleep(pause)
            wrecks = await self._ask(
                home.nanny,
                flight.salvage_here,
                home.directory,
                self._scheduler.id,
                home.incarnation,
            )
            if wrecks is None:
                break
            if wrecks:
                death.tell(_wreck(wrecks[0]))
        try:
            return await asyncio.wait_for(asyncio.shield(death.wreck), _PATIENCE)
        except asyncio.TimeoutError:
            return None

    async def _cause_of(self, death: _Death, wreck: flight.Wreck | None) -> str:
        """Return one of :data:`kills.CAUSES`, or :data:`_ORDERED`."""
        if death.time - self._memory_kills.get(death.worker, (0.0, 0))[0] < 60:
            return "memory"  # the nanny has said so
        home, ended = death.home, None
        # The nanny hears of the exit a moment after the kernel has let the file's lock go.
        for pause in _ASKING if home.nanny and home.pid is not None else ():
            await asyncio.sleep(pause)
            ended = await self._ask(home.nanny, flight.exit_here, home.pid)
            if ended is not None:
                break
        code, ordered = ended or (None, False)
        if ordered:
            return _ORDERED
        if wreck is not None and wreck.oom_kills and code in (None, -signal.SIGKILL):
            return "memory"
        return "signal" if code is not None and code < 0 else "lost"

    def _found(self, raw: Sequence[Any]) -> None:
        """Take a wreck that the next process has read."""
        try:
            self._tell(_wreck(raw))
        except Exception as error:  # of another version: the others are told all the same
            self._on_error(error)

    def _tell(self, wreck: flight.Wreck) -> None:
        incarnation = wreck.process["incarnation"]
        death = self._open.get(incarnation)
        if death is not None:
            death.tell(wreck)
        elif incarnation in self._settled:
            late, counted = self._settled[incarnation]
            self._settled[incarnation] = None, True
            if late is not None:  # it has come at last
                late.told_at = time.time()
                self._report(late, wreck)
            elif not counted:
                self._on_end(incarnation, wreck.observed)
        else:
            # It is back before the scheduler has noticed that it was gone.
            self._early[incarnation] = wreck
            while len(self._early) > _REMEMBERED:
                self._early.popitem(last=False)

    def _report(self, death: _Death, wreck: flight.Wreck | None) -> None:
        memory_at, memory_rss = self._memory_kills.pop(death.worker, (0.0, 0))
        self._on_end(death.home.incarnation, None if wreck is None else wreck.observed)
        keys = {flight.digest_of(key): key for key in death.processing}
        tasks = death.running if wreck is None else wreck.tasks
        for task in tasks:
            key = keys.get(task.digest, task.key)
            if wreck is None and task.digest not in keys:
                continue  # it had ended since
            if key in death.named:
                continue
            death.named.add(key)
            peak = task.peak_bytes
            if wreck is None:
                age = death.silence
            else:
                # All by the clock of the worker's machine, but for how long the file lay there.
                age = wreck.read_at - task.peak_time - max(0.0, death.told_at - death.time)
            # The nanny has seen the process's RSS last, and knows nothing of tasks: with one task
            # it is that task's window.
            if memory_rss > peak:
                peak, age = memory_rss, death.time - memory_at
            self._on_kill(
                Kill(
                    key=key,
                    prefix=key_split(key),
                    cause=death.cause,
                    worker=death.worker,
                    time=death.time,
                    peak_bytes=peak or None,
                    peak_age=max(0.0, age) if peak else None,
                    start=task.start or None,
                    start_bytes=task.start_bytes or None,
                    concurrency=max(task.concurrency, len(tasks)),
                    known_from="heartbeat" if wreck is None else "flight",
                )
            )
        if wreck is None and death.processing and not death.named:
            logger.warning(
                "dask-memusage: worker %s died (%s). Which of the %d tasks that were assigned to "
                "it were executing is not known: nobody has read its flight file yet, and its last "
                "heartbeat names none",
                death.worker,
                death.cause,
                len(death.processing),
            )
        if wreck is not None and wreck.left_out:
            logger.warning(
                "dask-memusage: worker %s died (%s) with more tasks at once than its flight file "
                "holds: %d are not named",
                death.worker,
                death.cause,
                wreck.left_out,
            )


def _wreck(raw: Sequence[Any]) -> flight.Wreck:
    """Return what has travelled, perhaps from a newer version."""
    process, tasks, *rest = raw[: len(flight.Wreck._fields)]
    return flight.Wreck(process, [flight.Flying.of(task) for task in tasks], *rest)
