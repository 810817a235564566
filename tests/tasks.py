"""Tasks that tests run on workers; imported there, so this module must stay light.

What starts processes is in ``tasks_children``, what is made of blocks of many kinds and of files in
``tasks_blocks``, what OpenTelemetry sees in ``tasks_spans``.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Reschedule, get_client, rejoin, secede, worker_client

MIB = 2**20


def array(mib: int = 100, hold: float = 0.0) -> None:
    """Hold one array for a while."""
    block = np.ones(mib * MIB // 8)
    time.sleep(hold)
    del block


def made(mib: int) -> np.ndarray:
    """Return an array."""
    return np.ones(mib * MIB // 8)


def nothing(*_: Any) -> None:
    """Do nothing, whatever the inputs are."""


def sleep(seconds: float) -> None:
    time.sleep(seconds)


class Gate:
    """A file that tasks wait for, in any process: they block on its lock, and use no processor."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._file = open(self.path, "w")  # noqa: SIM115
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        """Let everybody through, now and later."""
        self._file.close()

    @property
    def reached(self) -> bool:
        """Whether a task has come to it."""
        return os.path.exists(self.path + ".reached")


def is_open(path: str) -> bool:
    """Return whether a gate is open."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def reach(path: str) -> None:
    """Say that a task has come to a gate."""
    Path(path + ".reached").touch()


def wait_for(path: str, *_: Any) -> None:
    """Wait at a gate."""
    reach(path)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def hold_until(path: str, mib: int) -> None:
    """Hold an array until a gate opens."""
    block = np.ones(mib * MIB // 8)
    wait_for(path)
    del block


def counted_hold_until(path: str, mib: int) -> None:
    """The same, counting in a file the executions that hold it."""
    block = np.ones(mib * MIB // 8)
    times_before(path + ".executions")
    wait_for(path)
    del block


def busy_until(path: str) -> None:
    """Use the processor and next to no memory until a gate opens."""
    reach(path)
    while not is_open(path):
        sum(range(1000))


def array_after(path: str, mib: int) -> np.ndarray:
    """Return an array that is made once a gate opens."""
    wait_for(path)
    return np.ones(mib * MIB // 8)


def fail(mib: int = 100) -> None:
    array(mib)
    raise ValueError("on purpose")


def times_before(path: str) -> int:
    """Return how often this was called before; counts in a file."""
    with open(path, "a+") as file:
        file.write("x")
        return file.tell() - 1


def fail_twice(path: str, mib: int = 100) -> None:
    array(mib)
    if times_before(path) < 2:
        raise ValueError("on purpose")


def reschedule_once(path: str, mib: int = 100) -> None:
    array(mib)
    if times_before(path) < 1:
        raise Reschedule


def secede_and_rejoin(first: int, second: int) -> None:
    """Hold one array before seceding, and another after it."""
    array(first)
    secede()
    array(second, 0.02)
    rejoin()


def secede_until(path: str) -> None:
    """Leave the pool and do not end until a gate opens."""
    secede()
    wait_for(path)


def with_worker_client(count: int, mib: int) -> None:
    with worker_client() as client:
        client.gather(client.map(array, [mib] * count, key="inner", pure=False))


def with_get_client(count: int, mib: int) -> None:
    client = get_client()
    client.gather(client.map(array, [mib] * count, key="inner", pure=False))


async def coroutine(mib: int, path: str | None = None, *, error: bool = False) -> None:
    """Await, hold an array over another await, perhaps fail."""
    await asyncio.sleep(0)
    block = np.ones(mib * MIB // 8)
    while path is not None and not is_open(path):
        await asyncio.sleep(0.005)
    del block
    if error:
        raise ValueError("on purpose")


class Actor:
    """Methods of every kind."""

    def hold(self, path: str, mib: int = 0) -> None:
        hold_until(path, mib)

    def fail(self, mib: int) -> None:
        fail(mib)

    async def on_loop(self, mib: int) -> None:
        array(mib)


def in_c(mib: int) -> None:
    """Allocate in one call that holds the GIL all the time."""
    block = b"x" * (mib * MIB)
    del block


def arrays(count: int, mib: int) -> list[np.ndarray]:
    return [np.ones(mib * MIB // 8) for _ in range(count)]


def lazily(count: int, mib: int) -> Iterator[np.ndarray]:
    """Return a generator: nothing is allocated before somebody takes from it."""
    return (np.ones(mib * MIB // 8) for _ in range(count))


def taken(blocks: Iterator[np.ndarray]) -> int:
    """Hold all that a generator gives."""
    return len(list(blocks))


def leave() -> None:
    raise SystemExit(3)


def secede_only(*_: Any) -> None:
    """Leave the pool: another thread takes the place of this one, which ends."""
    secede()
