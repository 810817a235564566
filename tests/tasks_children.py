"""Tasks that start processes, fork or have a pool of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

from tests.tasks import MIB, array, made

#: A program that holds memory for a while: bytes, seconds.
HOLD = """
import sys, time
block = bytearray(int(sys.argv[1]))
for offset in range(0, len(block), 4096):
    block[offset] = 1
time.sleep(float(sys.argv[2]))
"""


def child_holds(mib: int, seconds: float) -> None:
    subprocess.run([sys.executable, "-c", HOLD, str(mib * MIB), str(seconds)], check=True)


def short_child(mib: int) -> None:
    """Run a program that lives for a millisecond or two, and hold an array."""
    subprocess.run(["/bin/true"], check=True)
    array(mib)


def unwaited_child(mib: int) -> int:
    """Start a program, do not wait for it, and hold an array."""
    child = os.spawnl(os.P_NOWAIT, "/bin/true", "true")
    array(mib)
    return child


def wait_for_child(child: int) -> None:
    os.waitpid(child, 0)


def fork_holds(mib: int, seconds: float) -> None:
    """Fork with multiprocessing; the child touches memory of its own."""
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=array, args=(mib, seconds))
    child.start()
    child.join()
    assert child.exitcode == 0


def bare_fork(seconds: float) -> int:
    """Fork with nothing around it; the child lives for a while. Return its exit status."""
    child = os.fork()
    if child == 0:
        time.sleep(seconds)
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def open_executor(dask_worker: Any) -> None:
    """Give a worker an executor of one forked process."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    fork = multiprocessing.get_context("fork")
    dask_worker.executors["processes"] = ProcessPoolExecutor(1, mp_context=fork)


def close_executor(dask_worker: Any) -> None:
    dask_worker.executors.pop("processes").shutdown()


#: A pool of one process, kept by a worker from task to task, and what that process keeps.
_pool: list[Any] = []
_kept: list[np.ndarray] = []


def open_pool(mib: int) -> None:
    """Start the pool, let its process hold an array for a while and let it go."""
    import multiprocessing

    _pool.append(multiprocessing.get_context("fork").Pool(1))
    _pool[0].apply(array, (mib, 0.1))
    time.sleep(0.1)


def beside_pool(mine: int, its: int, *, keeps: bool = False) -> None:
    """Hold an array, and have one made in the pool; its process may keep that."""
    block = np.ones(mine * MIB // 8)
    _pool[0].apply(keep if keeps else array, (its,))
    del block


def keep(mib: int) -> None:
    _kept.append(made(mib))


def close_pool() -> None:
    pool = _pool.pop()
    pool.terminate()
    pool.join()


def fork_and_look(mib: int) -> dict[str, Any]:
    """Fork, let the child look at what it has of us, hold an array; return what it has seen."""
    import json

    from prometheus_client import REGISTRY, generate_latest

    from dask_memusage_exporter import process

    def look() -> dict[str, Any]:
        links = []
        for name in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:  # the descriptor of the listing itself
                continue
        tracker = process._process.tracker
        return {
            "ours_open": [
                link for link in links if link.endswith(("clear_refs", "statm", "vmstat"))
            ],
            "starts": tracker.start(None, lambda: True) is not None,
            "exports": "task_memory" in generate_latest(REGISTRY).decode(),
        }

    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(into, json.dumps(look()).encode())
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    array(mib)
    seen = json.loads(os.read(out, 65536))
    for descriptor in (out, into):
        os.close(descriptor)
    return {**seen, "exit": os.waitstatus_to_exitcode(status)}
