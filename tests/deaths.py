"""Tasks that have their worker die, and what is known of it; ``dying`` is in conftest."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

from dask_memusage_exporter import flight
from tests.conftest import Measured, Metrics, scheduler_port, wait_until

MIB = 2**20


def grow(step_mib: int, pause: float, most_mib: int) -> None:
    """Allocate and touch memory step by step, then wait to be killed."""
    blocks = []
    for _ in range(0, most_mib, step_mib):
        blocks.append(b"x" * (step_mib * MIB))
        time.sleep(pause)
    time.sleep(600)


def hold_gil(mib: int) -> None:
    """Take memory and then never let the GIL go, from the first line on."""
    libc = ctypes.PyDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.memset(libc.malloc(mib * MIB), 1, mib * MIB)
    libc.sleep(600)


def nap(seconds: float) -> None:
    time.sleep(seconds)


def pids(measured: Measured) -> dict[str, int]:
    """Return the pid of each worker process by address."""
    cluster = measured.cluster
    return {
        worker.worker_address: worker.pid
        for worker in cluster.workers.values()
        if worker.worker_address is not None
    }


def running(measured: Measured, prefix: str) -> str | None:
    """Return the worker on which a task of a prefix runs, as its heartbeat says."""
    for state in measured.cluster.scheduler.workers.values():
        for task in (state.metrics.get("memusage") or {}).get("running", ()):
            if flight.Flying(*task).key.startswith(prefix):
                return state.address
    return None


def killed(measured: Measured, prefix: str, **labels: str) -> float:
    """Return how many tasks of a prefix the scheduler's page shows as killed."""
    metrics = Metrics.read(scheduler_port(measured.cluster))
    return metrics.total(
        "dask_scheduler_task_memory_killed_tasks_total", task_prefix_name=prefix, **labels
    )


def kill_when_running(measured: Measured, prefix: str, mib: int) -> None:
    """Kill -9 the worker that runs a task once its process has grown."""
    address = wait_until(lambda: running(measured, prefix) or _by_processing(measured, prefix))
    pid = pids(measured)[address]
    wait_until(lambda: rss_mib(pid) > mib, what=f"{mib} MiB in {pid}")
    os.kill(pid, signal.SIGKILL)


def _by_processing(measured: Measured, prefix: str) -> str | None:
    for state in measured.cluster.scheduler.workers.values():
        if any(ts.prefix.name == prefix for ts in state.processing):
            return state.address
    return None


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096 / MIB


def settled(measured: Measured) -> None:
    """Wait until all ends are settled, and not merely not yet noticed."""
    deaths = measured.cluster.scheduler.extensions["memusage"].deaths
    wait_until(lambda: not deaths.unsettled and not deaths._tasks, timeout=40)


def open_incarnations(measured: Measured) -> set[str]:
    """Return the incarnations of the workers that are connected, and of those that went lately."""
    deaths = measured.cluster.scheduler.extensions["memusage"].deaths
    return {home.incarnation for home in deaths._homes.values()} | set(deaths._settled)


def hold_gil_after(path: str, seconds: int) -> None:
    """Say that it runs, and never let the GIL go from then on."""
    Path(path).touch()
    ctypes.PyDLL(None).sleep(seconds)


# -- ends in order that look like kills --------------------------------------------------


def touch_and_nap(path: str, seconds: float) -> None:
    Path(path).touch()
    time.sleep(seconds)
