"""The seam: where a task starts and ends on its own thread.

``Worker.active_threads`` (``{thread id: key}``, documented in the Worker's docstring) is set and
deleted by distributed on the task's thread, right around the user's function. A dict of our own in
its place tells both moments, with key and thread, and no function of distributed is patched.

Tasks that are coroutines are told of by ``Worker.active_keys``, a set of the same kind.

Actors' methods that are coroutines, and what ``Client.run`` sends, run on the event loop and are
not in that dict. They come by handlers of the worker (``Server.handlers``), and are told of there.

Two traps, both handled here:

- Both happen while ``Worker.active_threads_lock`` is held, which the event loop takes every 10 ms
  for its profiler. The lock is wrapped, and what is to be done is done once it is released.
- The delete has no try/finally: an actor's method that raises leaves its entry. An entry is no
  proof that something runs, so an actor's entry is checked against the thread's stack.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import get_ident
from types import CodeType, FrameType, TracebackType
from typing import Any, Protocol

from dask.typing import Key
from dask.utils import key_split


class Listener(Protocol):
    """Who wants to know. Both are called on the task's own thread, with no lock held."""

    def on_start(self, thread: int, key: Key) -> None:
        """Something starts on this thread."""

    def on_stop(self, thread: int, key: Key) -> None:
        """Hear that it has ended."""


class ActiveThreads(dict[int, Key]):
    """``{thread id: key}``, as distributed keeps it, that tells of changes.

    Parameters
    ----------
    before
        The dict that this one stands in for. Tasks that were running keep it and take themselves
        off it; until then they are found here too (``get_worker().get_current_task()``).
    """

    def __init__(self, before: dict[int, Key], lock: ReleasingLock, listener: Listener) -> None:
        super().__init__()
        self._before = before
        self._after_release = lock.after_release
        self._on_start, self._on_stop = listener.on_start, listener.on_stop

    def __setitem__(self, thread: int, key: Key) -> None:
        dict.__setitem__(self, thread, key)
        self._after_release[thread] = (self._on_start, key)

    def __delitem__(self, thread: int) -> None:
        self._after_release[thread] = (self._on_stop, self.pop(thread))

    def __missing__(self, thread: int) -> Key:
        return self._before[thread]


class ActiveKeys(set[Key]):
    """``Worker.active_keys``, as distributed keeps it, that tells a coroutine of its own.

    It changes right around a task, in the asyncio task that awaits it: what is made current there
    is current in that coroutine, and nowhere else on the event loop.
    """

    def __init__(
        self, before: set[Key], enter: Callable[[Key], None], leave: Callable[[Key], None]
    ) -> None:
        super().__init__(before)
        self._enter, self._leave = enter, leave

    def add(self, key: Key) -> None:
        """Add a task that starts."""
        set.add(self, key)
        self._enter(key)

    def discard(self, key: Any) -> None:
        """Take a task off that has ended."""
        set.discard(self, key)
        self._leave(key)


class ReleasingLock:
    """A lock that does its holder's work right after it is released, on the same thread."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock, self._acquire, self._release = lock, lock.acquire, lock.release
        #: By thread, what to call once it lets the lock go, with ``(thread, key)``; never raises.
        self.after_release: dict[int, tuple[Callable[[int, Key], None], Key]] = {}

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, as ``threading.Lock.acquire`` does."""
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """Let the lock go and do the work."""
        self.__exit__(None, None, None)

    def locked(self) -> bool:
        """Return whether somebody holds the lock."""
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self._acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._release()
        if self.after_release:
            thread = get_ident()
            work = self.after_release.pop(thread, None)
            if work is not None:
                work[0](thread, work[1])


def install(worker: Any, listener: Listener) -> str | None:
    """Put the seam into a worker; return None, or why it cannot be put there.

    Once in, it stays for the worker's life: running tasks hold it.
    """
    before = getattr(worker, "active_threads", None)
    lock: Any = getattr(worker, "active_threads_lock", None)
    if type(before) is not dict or not hasattr(lock, "acquire") or not hasattr(lock, "release"):
        return (
            f"Worker.active_threads is a {type(before).__name__} and its lock a "
            f"{type(lock).__name__}, where this version knows a dict and a Lock"
        )
    releasing = ReleasingLock(lock)
    with releasing:
        worker.active_threads = ActiveThreads(before, releasing, listener)
        worker.active_threads_lock = releasing
    return None


def listen_in_coroutines(
    worker: Any, enter: Callable[[Key], None], leave: Callable[[Key], None]
) -> None:
    """Tell of tasks in the context of their coroutine, which neither may raise in; once."""
    if type(worker.active_keys) is set:
        worker.active_keys = ActiveKeys(worker.active_keys, enter, leave)


def listen_on_loop(
    worker: Any,
    running: Callable[[str | None], AbstractContextManager[Callable[[Any], None]]],
    raised: Callable[[str | None, Any], None],
) -> None:
    """Tell of code of a user's that handlers run.

    Parameters
    ----------
    running
        Its context is entered while some runs on the event loop, with ``Class.method`` of an
        actor's; it yields what is called with the exception that an actor's has raised.
    raised
        Called with ``Class.method`` and the exception that an actor's has raised on a thread.
    """

    def told(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)  # distributed looks at the signature
        async def tell(*args: Any, **kwargs: Any) -> Any:
            with running(_actor_method(kwargs)) as failed:
                result = handler(*args, **kwargs)
                result = await result if inspect.isawaitable(result) else result
                _tell_error(result, failed)
                return result

        return tell

    for name in ("run", "run_coroutine"):
        if name in worker.handlers:
            worker.handlers[name] = told(worker.handlers[name])
    execute = worker.handlers.get("actor_execute")
    if execute is not None:
        on_loop = told(execute)

        @functools.wraps(execute)
        async def actor_execute(*args: Any, **kwargs: Any) -> Any:
            if not _actor_has_thread(worker, kwargs):
                return await on_loop(*args, **kwargs)
            result = await execute(*args, **kwargs)
            _tell_error(result, functools.partial(raised, _actor_method(kwargs)))
            return result

        worker.handlers["actor_execute"] = actor_execute


def _actor_method(call: dict[str, Any]) -> str | None:
    """Return the name of an actor's method as distributed has it; None: it is none."""
    actor = call.get("actor")
    return None if actor is None else f"{key_split(actor)}.{call.get('function')}"


def _tell_error(result: Any, failed: Callable[[Any], None]) -> None:
    # Worker.actor_execute answers so, with a Serialize around the exception.
    if isinstance(result, dict) and result.get("status") == "error":
        failed(getattr(result.get("exception"), "data", None))


def _actor_has_thread(worker: Any, call: dict[str, Any]) -> bool:
    """Return whether a call of an actor's method will be in ``active_threads``."""
    # distributed's own rule, Worker.actor_execute.
    actor = worker.state.actors.get(call.get("actor"))
    method = getattr(actor, call.get("function", ""), None)
    separate = (call.get("kwargs") or {}).get("separate_thread", True)
    return bool(separate) and not inspect.iscoroutinefunction(method)


def caller(outside: str) -> CodeType:
    """Return the code of the innermost frame of this thread that is in no module of ``outside``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(outside):
        frame = frame.f_back
    return (frame or sys._getframe(1)).f_code


def runs(thread: int, code: CodeType) -> bool:
    """Return whether ``code`` is on the stack of a thread. From any thread; costs some us."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
