"""The seam: a dict, a lock and handlers of distributed's, with ours in their place."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from dask_memusage_exporter import install, seam
from tests import tasks
from tests.conftest import Metrics, Records, scheduler_port, wait_until


class Listener:
    """Notes what it hears, and whether the lock was held then."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.heard: list[tuple[str, int, str, bool]] = []

    def on_start(self, thread: int, key: str) -> None:
        self.heard.append(("start", thread, key, self.worker.active_threads_lock.locked()))

    def on_stop(self, thread: int, key: str) -> None:
        self.heard.append(("stop", thread, key, self.worker.active_threads_lock.locked()))


@pytest.fixture
def worker() -> Any:
    """What the seam needs of a worker, with a task that runs already."""
    return SimpleNamespace(active_threads={1: "old"}, active_threads_lock=threading.Lock())


def test_told_once_the_lock_is_free(worker: Any) -> None:
    """Both are told on the task's thread right after the lock is released, in order."""
    listener = Listener(worker)
    assert seam.install(worker, listener) is None
    me = threading.get_ident()
    with worker.active_threads_lock:
        worker.active_threads[me] = "key"
        assert not listener.heard
    assert worker.active_threads[me] == "key"
    with worker.active_threads_lock:
        del worker.active_threads[me]
    assert listener.heard == [("start", me, "key", False), ("stop", me, "key", False)]
    assert not worker.active_threads_lock.after_release


def test_other_holders_of_the_lock(worker: Any) -> None:
    """Who else takes the lock does nobody's work, not even between another's change and release."""
    listener = Listener(worker)
    seam.install(worker, listener)
    lock, threads = worker.active_threads_lock, worker.active_threads
    with lock:
        pass
    assert lock.acquire(timeout=1)
    assert lock.locked()
    threads[2] = "theirs"
    assert not lock.acquire(blocking=False)
    lock.release()
    # It was not this thread that started.
    assert not listener.heard
    assert dict(threads.items()) == threads.copy() == {2: "theirs"}


def test_tasks_that_ran_before(worker: Any) -> None:
    """Entries of tasks that were running are found until they take themselves off."""
    old = worker.active_threads
    seam.install(worker, Listener(worker))
    assert worker.active_threads[1] == "old"
    del old[1]
    with pytest.raises(KeyError):
        worker.active_threads[1]


def test_waiting_for_the_lock(worker: Any) -> None:
    """It is a lock: a second thread waits for the first."""
    listener = Listener(worker)
    seam.install(worker, listener)
    tries, got = threading.Event(), threading.Event()

    def start() -> None:
        tries.set()
        with worker.active_threads_lock:
            worker.active_threads[threading.get_ident()] = "second"
        got.set()

    with worker.active_threads_lock:
        thread = threading.Thread(target=start)
        thread.start()
        assert tries.wait(10)
        assert not got.is_set()
        assert not listener.heard
    assert got.wait(10)
    thread.join()
    assert [what for what, *_ in listener.heard] == ["start"]


@pytest.mark.parametrize(
    ("threads", "lock"),
    [({}, None), (None, threading.Lock()), ([], threading.Lock())],
)
def test_another_distributed(threads: Any, lock: Any) -> None:
    """Where the two are something else the seam stays out, and says what it has found."""
    worker = SimpleNamespace(active_threads=threads, active_threads_lock=lock)
    assert "Worker.active_threads is a" in (seam.install(worker, Listener(worker)) or "")
    assert worker.active_threads is threads


def test_whether_a_call_runs() -> None:
    """A call is on its thread's stack while it runs, and not after it has raised."""
    go, stop, again = threading.Event(), threading.Event(), threading.Event()
    seen: list[Any] = []

    def method() -> None:
        seen.append(seam.caller("dask_memusage_exporter"))
        go.set()
        stop.wait()
        raise ValueError("on purpose")

    def call() -> None:
        with pytest.raises(ValueError, match="on purpose"):
            method()
        again.wait()

    thread = threading.Thread(target=call)
    thread.start()
    go.wait()
    assert seen[0] is method.__code__
    assert seam.runs(thread.ident, seen[0])
    stop.set()
    wait_until(lambda: not seam.runs(thread.ident, seen[0]))
    again.set()
    thread.join()
    assert not seam.runs(thread.ident, seen[0])


class Actor:
    """One method of each kind."""

    def method(self) -> None:
        pass

    async def coroutine(self) -> None:
        pass


def fail() -> None:
    raise ValueError("on purpose")


def test_code_on_the_event_loop() -> None:
    """Handlers that run a user's code on the loop enter the context, and answer as they did."""
    inside: list[str] = []
    entered: list[str] = []

    raised: list[Any] = []
    names: list[str | None] = []

    @contextmanager
    def running(name: str | None) -> Iterator[Callable[[Any], None]]:
        names.append(name)
        entered.append("in")
        try:
            yield raised.append
        finally:
            entered.append("out")

    def run(comm: Any, function: Any) -> Any:
        inside.extend(entered)
        return function()

    async def actor_execute(actor: str, function: str, kwargs: Any = None) -> Any:
        if function == "raises":
            return {"status": "error", "exception": SimpleNamespace(data=function)}
        return function

    worker = SimpleNamespace(
        handlers={"run": run, "actor_execute": actor_execute},
        state=SimpleNamespace(actors={"key": Actor()}),
    )
    seam.listen_on_loop(worker, running, lambda _, error: raised.append(error))
    # distributed looks at the first argument's name and at the handler's.
    assert list(inspect.signature(worker.handlers["run"]).parameters) == ["comm", "function"]
    assert worker.handlers["run"].__name__ == "run"
    assert asyncio.run(worker.handlers["run"](None, lambda: 1)) == 1
    assert (inside, entered) == (["in"], ["in", "out"])
    with pytest.raises(ValueError, match="on purpose"):
        asyncio.run(worker.handlers["run"](None, fail))
    assert entered == ["in", "out"] * 2
    for function, kwargs, on_loop in (
        ("method", None, False),
        ("method", {"separate_thread": False}, True),
        ("coroutine", {}, True),
        ("no-such-method", {}, False),
    ):
        entered.clear()
        call = worker.handlers["actor_execute"](actor="key", function=function, kwargs=kwargs)
        assert asyncio.run(call) == function
        assert bool(entered) == on_loop
    assert names == [None, None, "key.method", "key.coroutine"]
    # What an actor's method has raised is told, on the loop and on a thread.
    for kwargs in ({"separate_thread": False}, {}):
        call = worker.handlers["actor_execute"](actor="key", function="raises", kwargs=kwargs)
        assert asyncio.run(call)["status"] == "error"
    assert raised == ["raises"] * 2


@pytest.mark.parametrize("known", [True, False])
def test_workers_without_the_seam(
    known: bool, make_cluster: Any, make_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a distributed that keeps no such dict, or keeps it elsewhere, which the first task tells.

    Tasks are measured from their transitions: none is claimed to be its own, and a line says why.
    """
    cluster = make_cluster(processes=False)
    client = make_client(cluster)
    (worker,) = cluster.workers.values()
    if known:
        worker.active_threads = OrderedDict()
    records = Records()
    install(cluster)
    cluster.scheduler.extensions["memusage"].add_sink(records)
    install(cluster)
    if not known:
        worker.active_threads, worker.active_threads_lock = {}, threading.Lock()
        client.submit(abs, -1, key="first-1").result()
    client.submit(tasks.array, 50, key="bare-1").result()
    assert client.submit(tasks.fail, 1, key="bare-2").exception() is not None
    grown, failed = records.of("bare")
    assert grown.peak_bytes - grown.start_bytes >= 49 * 2**20
    assert (grown.status, failed.status) == ("finished", "erred")
    for record in (grown, failed):
        assert (record.scope, record.growth_bytes) == ("shared", None)
    assert len(records) == 2
    metrics = Metrics.read(scheduler_port(cluster))
    assert metrics.total("dask_worker_task_memory_dropped_records_total") == (0 if known else 1)
    assert metrics.total("dask_worker_task_memory_errors_total") == 0
    (line,) = (one for one in caplog.messages if "cannot be used in this version" in one)
    assert ("OrderedDict" if known else "none has ever been told of") in line
