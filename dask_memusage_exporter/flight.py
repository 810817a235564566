"""The flight recorder: what was running when a process died.

A worker that is killed says nothing any more. So it keeps a small file, mapped into its memory:
which tasks run, since when and how high, and how many records it has made and sent. The pages
belong to the kernel, so the file is whole after any kill that the machine survives. It is written
on the event loop when a task is handed over, and on its own thread, one byte, right before and
after the task's code runs: a task that holds the GIL until the end stands in it, and one that only
waits for a thread does not. Peaks are updated by the sampler, every 10 ms while the GIL is free;
their age is kept with them.

Whoever comes after reads it: the nanny, or the next process that uses the same directory. A living
process holds a lock on its file (flock(2)), which the kernel lets go with the process, in any
container and pid namespace that shares the directory.

Covers: executing tasks of one process, the cgroup's count of OOM kills at its start, counts of
records.
Does not cover: actor calls, a machine that is lost with its disk, and a directory that nobody reads
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import struct
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SUFFIX = ".flight"
_MAGIC = b"dask-memusage flight 2\n"

#: Bytes for the description of the process, as JSON.
_HEADER = 4096
#: Records made so far, and tasks for which there is no slot now, right behind the magic.
_COUNTS = struct.Struct("<QQ")
#: A slot: its state; the key's digest and length; then what changes while the task runs: start,
#: time of the peak, RSS at the start, peak, concurrency.
_HEAD = struct.Struct("<B8sH")
_FIELDS = struct.Struct("<ddQQH")
_WHOLE = struct.Struct(_HEAD.format + _FIELDS.format.removeprefix("<"))
#: In place of the digest of a key that is its own text: the reader makes it.
_BY_TEXT = bytes(8)
_SLOT_BYTES = 1024
_KEY_AT = _HEAD.size + _FIELDS.size
_KEY_BYTES = _SLOT_BYTES - _KEY_AT
#: States of a slot.
_FREE, WAITS, RUNS = 0, 1, 2
#: Tasks that can stand in the file at once; more than these are only counted.
SLOTS = 256

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
    #: See :func:`digest_of`: other keys may have the same text.
    digest: bytes = b""

    @classmethod
    def of(cls, raw: Sequence[Any]) -> Flying:
        """Return one that has travelled; fields that only a newer version has are left out."""
        return cls(*raw[: len(cls._fields)])


class Wreck(NamedTuple):
    """What a file says of a process that has died."""

    #: See :meth:`FlightFile.__init__`.
    process: dict[str, Any]
    tasks: list[Flying]
    #: Records that it had made.
    observed: int
    #: Tasks that were handed over and for which there was no slot.
    left_out: int
    #: OOM kills in its cgroup since it started; None: not known.
    oom_kills: int | None
    #: When the file was read, in seconds since the epoch by the clock of the same machine.
    read_at: float


def text_of(key: object) -> str:
    """Return a key as it stands in a file and in heartbeats: text, cut to what a slot holds."""
    text = str(key)
    if text.isascii():
        return text[:_KEY_BYTES]
    return text.encode("utf-8", "replace")[:_KEY_BYTES].decode("utf-8", "ignore")


def digest_of(key: object) -> bytes:
    """Return what tells a key from all others, of whatever type and length."""
    text = repr(key).encode("utf-8", "backslashreplace")
    return hashlib.blake2b(text, digest_size=8).digest()


class FlightFile:
    """The file of a living process. Not thread-safe; slots are independent of each other.

    Parameters
    ----------
    directory
        Made if it is not there, for this user only.
    process
        What whoever reads the file must know: plain types, up to about 3 kB as JSON. The file adds
        ``pid``, ``started``, ``cgroup`` and ``oom_kills``; ``incarnation`` is its unique name.

    Raises
    ------
    OSError
        The directory cannot be written.
    """

    def __init__(self, directory: str, process: dict[str, Any]) -> None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        self.path = os.path.join(directory, process["incarnation"] + SUFFIX)
        self._free = list(range(SLOTS - 1, -1, -1))
        #: Whose each slot is, so that a late update does not go into another's.
        self._owners: list[object] = [None] * SLOTS
        self._observed = self._left_out = 0
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            # Not a hole: writing into one on a full disk would end the process by SIGBUS.
            os.posix_fallocate(self._fd, 0, _HEADER + SLOTS * _SLOT_BYTES)
            self._map = mmap.mmap(self._fd, 0)
            #: The state of each slot: a task's thread sets :data:`RUNS` when the task's own code
            #: begins, and :data:`WAITS` when it has ended.
            self.states = memoryview(self._map)[_HEADER::_SLOT_BYTES]
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
            "pid": os.getpid(),
            "started": time.time(),
            "cgroup": cgroup(),
            "oom_kills": oom_kills(),
        }
        text = json.dumps(full).encode()
        room = _HEADER - len(_MAGIC) - _COUNTS.size
        if len(text) > room:
            raise OSError(f"the flight file has {room} bytes for the process, not {len(text)}")
        start = len(_MAGIC) + _COUNTS.size
        self._map[start:_HEADER] = text.ljust(room)
        self._map[: len(_MAGIC)] = _MAGIC

    def begin(self, key: object, start: float) -> int | None:
        """Note that a task is handed over; return its slot, or None where there is none left."""
        if not self._free:
            self.left_out(self._left_out + 1)
            return None
        slot = self._free.pop()
        if type(key) is str and len(key) <= _KEY_BYTES and key.isascii():
            raw, digest = key.encode(), _BY_TEXT
        else:
            raw, digest = text_of(key).encode(), digest_of(key)
        at = _HEADER + slot * _SLOT_BYTES
        self._map[at + _KEY_AT : at + _KEY_AT + len(raw)] = raw
        self._owners[slot] = key
        _WHOLE.pack_into(self._map, at, WAITS, digest, len(raw), start, 0.0, 0, 0, 1)
        return slot

    def update(
        self,
        slot: int,
        key: object,
        *,
        start: float,
        start_bytes: int,
        peak_bytes: int,
        concurrency: int,
    ) -> None:
        """Note how high a task has been, as of now; nothing where the slot is another's by now."""
        at = _HEADER + slot * _SLOT_BYTES + _HEAD.size
        fields = (start, time.time(), start_bytes, peak_bytes, min(concurrency, 0xFFFF))
        # Another thread may get its turn after any call: none stands between these two.
        if self._owners[slot] is key:
            _FIELDS.pack_into(self._map, at, *fields)

    def end(self, slot: int | None) -> None:
        """Note that a task is over; None is one that had no slot."""
        if slot is None:
            self.left_out(self._left_out - 1)
            return
        self._owners[slot] = None
        self.states[slot] = _FREE
        self._free.append(slot)

    def count(self, observed: int) -> None:
        """Note how many records there have been."""
        self._observed = observed
        _COUNTS.pack_into(self._map, len(_MAGIC), observed, self._left_out)

    def left_out(self, tasks: int) -> None:
        """Note how many tasks there are for which there is no slot."""
        self._left_out = tasks
        _COUNTS.pack_into(self._map, len(_MAGIC), self._observed, tasks)

    def close(self) -> None:
        """Take the file away: the process ends in order and leaves nothing untold."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self.forget()

    def forget(self) -> None:
        """Let go of the file without taking it away: somebody else is to read it."""
        if self._fd >= 0:
            self.states.release()
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
        observed, left_out = _COUNTS.unpack_from(raw, len(_MAGIC))
        return Wreck(
            process, _tasks(raw), observed, left_out, _oom_kills_since(process), time.time()
        )
    finally:
        os.close(fd)


def _tasks(raw: bytes) -> list[Flying]:
    tasks = []
    for at in range(_HEADER, len(raw), _SLOT_BYTES):
        state, digest, length = _HEAD.unpack_from(raw, at)
        if state == RUNS:
            start, peak_time, start_bytes, peak_bytes, concurrency = _FIELDS.unpack_from(
                raw, at + _HEAD.size
            )
            key = raw[at + _KEY_AT : at + _KEY_AT + length].decode("utf-8", "replace")
            if digest == _BY_TEXT:
                digest = digest_of(key)
            tasks.append(
                Flying(key, start, start_bytes, peak_bytes, peak_time, concurrency, digest)
            )
    return tasks


def cgroup() -> str | None:
    """Return what tells this process's cgroup from all others; None where there is none (v2)."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        return f"{group} {os.stat(Path('/sys/fs/cgroup', group.lstrip('/'))).st_ino}"
    except OSError:
        return None


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
    before: int | None = process.get("oom_kills")
    now = oom_kills()
    # Who reads may be in another cgroup: a container that was started anew has a new one.
    if before is None or now is None or process.get("cgroup") != cgroup():
        return None
    return max(0, now - before)


# -- in the nanny ----------------------------------------------------------------------


class _Watch:
    """What is known of one ``WorkerProcess``, which a nanny keeps for all its worker processes."""

    def __init__(self) -> None:
        self.pid: int | None = None
        #: Whether the nanny itself ends the process, because somebody has asked for it.
        self.ordered = False


#: Of the worker processes of a nanny: exit code, and whether the nanny had ended it in order.
_exits: dict[int, tuple[int, bool]] = {}

#: Seconds that telling the scheduler may take before a worker is ended in order.
_TELLING = 0.5


def watch_nanny(dask_worker: Any) -> None:
    """Note how the worker processes of a nanny end; runs in the nanny (``Nanny.run``).

    ``WorkerProcess.on_exit`` is called with the exit code, which nobody keeps. ``kill`` is called
    for all ends that somebody has ordered (scaling down, restarting, SIGTERM), and not where the
    nanny kills for memory. A worker that holds the GIL cannot say goodbye then: the nanny does.
    """
    nanny, process = dask_worker, dask_worker.process
    if process is None:
        return
    known = getattr(process.on_exit, "of_memusage", None)
    if known is not None:
        known.pid = process.pid  # the object stays when the process is started anew
        return
    watch = _Watch()
    watch.pid = process.pid
    before_exit, before_kill = process.on_exit, process.kill

    def on_exit(code: int) -> None:
        if watch.pid is not None:
            _exits[watch.pid] = code, watch.ordered
        watch.ordered = False
        while len(_exits) > 100:
            del _exits[next(iter(_exits))]
        if before_exit is not None:
            before_exit(code)

    async def kill(*args: Any, **kwargs: Any) -> Any:
        if process.pid is not None:
            watch.ordered = True
            with contextlib.suppress(Exception):  # the scheduler may be gone, or lack the handler
                leaving = nanny.scheduler.memusage_leaving(worker=nanny.worker_address)
                await asyncio.wait_for(leaving, _TELLING)
        return await before_kill(*args, **kwargs)

    on_exit.of_memusage = watch  # type: ignore[attr-defined]
    process.on_exit, process.kill = on_exit, kill


def salvage_here(directory: str, scheduler_id: str, incarnation: str) -> list[Any]:
    """Read the file of a worker that died; runs in its nanny."""
    return [tuple(wreck) for wreck in salvage(directory, scheduler_id, incarnation)]


def exit_here(pid: int) -> tuple[int, bool] | None:
    """Return how a worker process ended, once its nanny knows; runs in the nanny."""
    return _exits.get(pid)
