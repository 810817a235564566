"""The flight recorder: what was running when a process died.

A worker that is killed says nothing any more. So it keeps a small file, mapped into its memory:
which tasks run, since when and how high, and how many records it has made and sent. The pages
belong to the kernel, so the file is whole after any kill that the machine survives. It is written
on the event loop when a task is handed to its thread, before the task's code runs: a task that
holds the GIL until the end stands in it. Peaks are updated by the sampler, every 10 ms while the
GIL is free; their age is kept with them.

Whoever comes after reads it: the nanny, or the next process that uses the same directory. A living
process holds a lock on its file (flock(2)), which the kernel lets go with the process, in any
container and pid namespace that shares the directory.

Covers: executing tasks and actor calls of one process, the cgroup's count of OOM kills at its
start, counts of records.
Does not cover: a machine that is lost with its disk, and a directory that nobody reads again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import tempfile
import time
import uuid
import weakref
from pathlib import Path
from typing import Any, NamedTuple

SUFFIX = ".flight"
_MAGIC = b"dask-memusage flight 1\n"

#: Bytes for the description of the process, as JSON.
_HEADER = 4096
#: Records observed and sent, right behind the magic.
_COUNTS = struct.Struct("<QQ")
#: A slot: in use, key's length, start, time of the peak, RSS at the start, peak, concurrency.
_SLOT = struct.Struct("<BHddQQH")
_SLOT_BYTES = 1024
_KEY_BYTES = _SLOT_BYTES - _SLOT.size
#: Tasks that can stand in the file at once; more than these are left out.
SLOTS = 128

#: Files of other schedulers are swept away when nobody has claimed them for so long.
STALE_SECONDS = 7 * 86_400


class Flying(NamedTuple):
    """A task that was executing. Times are seconds since the epoch by the worker's clock."""

    #: The key as text; cut to about a thousand bytes.
    key: str
    start: float
    #: RSS of the process when it started; 0: not seen yet.
    start_bytes: int
    #: The last peak that was seen, and when; 0: none.
    peak_bytes: int
    peak_time: float
    #: The most tasks in the process at once so far.
    concurrency: int


class Wreck(NamedTuple):
    """What a file says of a process that has died."""

    #: See :meth:`FlightFile.__init__`.
    process: dict[str, Any]
    tasks: list[Flying]
    #: Records that it had made, and those of them that it had handed to its stream.
    observed: int
    sent: int
    #: OOM kills in its cgroup since it started; None: not known.
    oom_kills: int | None


def text_of(key: object) -> str:
    """Return a key as it stands in a file and in heartbeats: text, cut to what a slot holds."""
    text = str(key)
    if text.isascii():
        return text[:_KEY_BYTES]
    return text.encode("utf-8", "replace")[:_KEY_BYTES].decode("utf-8", "ignore")


class FlightFile:
    """The file of a living process. Not thread-safe; slots are independent of each other.

    Parameters
    ----------
    directory
        Made if it is not there, for this user only.
    process
        What whoever reads the file must know: plain types, up to about 3 kB as JSON. The file adds
        ``incarnation`` (unique), ``pid``, ``started`` and ``oom_kills``.

    Raises
    ------
    OSError
        The directory cannot be written.
    """

    def __init__(self, directory: str, process: dict[str, Any]) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.incarnation = uuid.uuid4().hex
        self.path = os.path.join(directory, self.incarnation + SUFFIX)
        self._free = list(range(SLOTS - 1, -1, -1))
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            # Not a hole: writing into one on a full disk would end the process by SIGBUS.
            os.posix_fallocate(self._fd, 0, _HEADER + SLOTS * _SLOT_BYTES)
            self._map = mmap.mmap(self._fd, 0)
            self.describe(process)
        except OSError:
            os.close(self._fd)
            os.unlink(self.path)
            raise
        _files.add(self)

    def describe(self, process: dict[str, Any]) -> None:
        """Write what the process is, anew."""
        full = {
            **process,
            "incarnation": self.incarnation,
            "pid": os.getpid(),
            "started": time.time(),
            "oom_kills": oom_kills(),
        }
        text = json.dumps(full).encode()
        room = _HEADER - len(_MAGIC) - _COUNTS.size
        if len(text) > room:
            raise OSError(f"the flight file has {room} bytes for the process, not {len(text)}")
        start = len(_MAGIC) + _COUNTS.size
        self._map[start:_HEADER] = text.ljust(room)
        self._map[: len(_MAGIC)] = _MAGIC

    def begin(self, key: str, start: float) -> int | None:
        """Note that a task executes; return its slot, or None where there is none left.

        ``key`` is as :func:`text_of` returns it.
        """
        if not self._free:
            return None
        slot = self._free.pop()
        raw = key.encode()
        at = _HEADER + slot * _SLOT_BYTES
        self._map[at + _SLOT.size : at + _SLOT.size + len(raw)] = raw
        _SLOT.pack_into(self._map, at, 1, len(raw), start, 0.0, 0, 0, 1)
        return slot

    def update(
        self, slot: int, *, start: float, start_bytes: int, peak_bytes: int, concurrency: int
    ) -> None:
        """Note how high a task has been, as of now."""
        at = _HEADER + slot * _SLOT_BYTES
        used, length, *_ = _SLOT.unpack_from(self._map, at)
        if used:
            _SLOT.pack_into(
                self._map, at, 1, length, start, time.time(), start_bytes, peak_bytes,
                min(concurrency, 0xFFFF),
            )  # fmt: skip

    def end(self, slot: int) -> None:
        """Note that a task executes no longer."""
        self._map[_HEADER + slot * _SLOT_BYTES] = 0
        self._free.append(slot)

    def count(self, observed: int, sent: int) -> None:
        """Note how many records there have been, and how many of them were sent."""
        _COUNTS.pack_into(self._map, len(_MAGIC), observed, sent)

    def close(self) -> None:
        """Take the file away: the process ends in order and leaves nothing untold."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self.forget()

    def forget(self) -> None:
        """Let go of the file without taking it away (in a forked child)."""
        if self._fd >= 0:
            self._map.close()
            os.close(self._fd)
            self._fd = -1


_files: weakref.WeakSet[FlightFile] = weakref.WeakSet()


def _after_fork() -> None:
    # A child shares the lock, by descriptor and by mapping, and would keep a dead parent alive.
    for file in list(_files):
        file.forget()


os.register_at_fork(after_in_child=_after_fork)


def default_directory(temporary: str | None) -> str:
    """Return where files are kept unless a setting says so: beside Dask's own scratch space.

    Not in a worker's own directory: the nanny removes that with the worker.
    """
    base = temporary or tempfile.gettempdir()
    return os.path.join(base, f"dask-memusage-flight-{os.getuid()}")


def salvage(directory: str, scheduler_id: str, incarnation: str | None = None) -> list[Wreck]:
    """Read and remove the files of processes that have died under a scheduler.

    Parameters
    ----------
    directory
        Where the files are; it may be missing.
    scheduler_id
        Files of other schedulers are left to others, until they are stale.
    incarnation
        Only this one; None: all.

    Returns
    -------
    list of Wreck
        Each is returned by one call only, whoever calls.
    """
    wrecks = []
    for path in Path(directory).glob(f"{incarnation or '*'}{SUFFIX}"):
        with contextlib.suppress(OSError, ValueError, KeyError, struct.error):
            wreck = _read(path, scheduler_id)
            if wreck is not None:
                wrecks.append(wreck)
    return wrecks


def _read(path: Path, scheduler_id: str) -> Wreck | None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None  # it lives, or another one reads it
        raw = os.pread(fd, _HEADER + SLOTS * _SLOT_BYTES, 0)
        if not raw.startswith(_MAGIC):
            if time.time() - path.stat().st_mtime > 60:
                path.unlink()  # it died while it began
            return None
        process = json.loads(raw[len(_MAGIC) + _COUNTS.size : _HEADER])
        if process.get("scheduler_id") != scheduler_id:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
            return None
        path.unlink()
        observed, sent = _COUNTS.unpack_from(raw, len(_MAGIC))
        return Wreck(process, _tasks(raw), observed, sent, _oom_kills_since(process))
    finally:
        os.close(fd)


def _tasks(raw: bytes) -> list[Flying]:
    tasks = []
    for at in range(_HEADER, len(raw), _SLOT_BYTES):
        used, length, start, peak_time, start_bytes, peak_bytes, concurrency = _SLOT.unpack_from(
            raw, at
        )
        if used:
            key = raw[at + _SLOT.size : at + _SLOT.size + length].decode("utf-8", "replace")
            tasks.append(Flying(key, start, start_bytes, peak_bytes, peak_time, concurrency))
    return tasks


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed for memory in this process's cgroup.

    cgroup v2, ``memory.events`` (Documentation/admin-guide/cgroup-v2.rst); None where it is not
    there, as in the root cgroup.
    """
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        text = Path("/sys/fs/cgroup", group.lstrip("/"), "memory.events").read_text()
    except OSError:
        return None
    fields = dict(line.split() for line in text.splitlines())
    return int(fields["oom_kill"]) if "oom_kill" in fields else None


def _oom_kills_since(process: dict[str, Any]) -> int | None:
    before, now = process.get("oom_kills"), oom_kills()
    # A container that was restarted has a new cgroup, whose count begins at 0 again.
    return None if before is None or now is None else max(0, now - before)


def watch_nanny(dask_worker: Any) -> None:
    """Note how the worker process of a nanny ends; runs in the nanny (``Nanny.run``).

    ``WorkerProcess.on_exit`` is called with the exit code, which nobody keeps.
    """
    process = dask_worker.process
    if process is None or getattr(process.on_exit, "of_memusage", False):
        return
    pid, before = process.pid, process.on_exit

    def on_exit(code: int) -> None:
        _exits[pid] = code
        while len(_exits) > 100:
            del _exits[next(iter(_exits))]
        if before is not None:
            before(code)

    on_exit.of_memusage = True  # type: ignore[attr-defined]
    process.on_exit = on_exit


#: Exit codes of worker processes that ended under a nanny of this process, by pid.
_exits: dict[int, int] = {}


def salvage_here(directory: str, scheduler_id: str, incarnation: str) -> list[Any]:
    """Read the file of a worker that died; runs in its nanny."""
    return [tuple(wreck) for wreck in salvage(directory, scheduler_id, incarnation)]


def exit_code_here(pid: int) -> int | None:
    """Return how a worker process ended, once its nanny knows; runs in the nanny."""
    return _exits.get(pid)
