"""The seam: where a task starts and ends on its own thread.

``Worker.active_threads`` (``{thread id: key}``, documented in the Worker's docstring) is set and
deleted by distributed on the task's thread, right around the user's function. A dict of our own in
its place tells both moments, with key and thread, and no function of distributed is patched.

Two traps, both handled here:

- Both happen while ``Worker.active_threads_lock`` is held, which the event loop takes every 10 ms
  for its profiler. The lock is wrapped, and what is to be done is done once it is released.
- The delete has no try/finally: an actor's method that raises leaves its entry. An entry is no
  proof that something runs, so an actor's entry is checked against the thread's stack.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any, Protocol

from dask.typing import Key


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
        super().__setitem__(thread, key)
        self._after_release[thread] = (self._on_start, key)

    def __delitem__(self, thread: int) -> None:
        key = self[thread]
        super().__delitem__(thread)
        self._after_release[thread] = (self._on_stop, key)

    def __missing__(self, thread: int) -> Key:
        return self._before[thread]


class ReleasingLock:
    """A lock that does its holder's work right after it is released, on the same thread."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        #: By thread, what to call once it lets the lock go, with ``(thread, key)``; never raises.
        self.after_release: dict[int, tuple[Callable[[int, Key], None], Key]] = {}

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the lock, as ``threading.Lock.acquire`` does."""
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        """Let the lock go and do the work."""
        self._lock.release()
        if self.after_release:
            thread = threading.get_ident()
            work = self.after_release.pop(thread, None)
            if work is not None:
                work[0](thread, work[1])

    def locked(self) -> bool:
        """Return whether somebody holds the lock."""
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.release()


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
