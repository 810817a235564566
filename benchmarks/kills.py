"""Workers killed in the middle of a task: is the right task named, and how near was the last peak.

Each kill is a real ``kill -9`` of a real worker process, at a moment drawn by chance, beside tasks
that wait in the same worker's queue. The truth is the process's RSS as this script reads it from
procfs just before it kills.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
from distributed.core import Status

from benchmarks.harness import MIB, OURS, Spread, bench, isolated
from benchmarks.report import Result, Table, Target

#: A peak counts as right within this share, or if it is younger than so many seconds.
WITHIN, YOUNG = 0.10, 0.1


def fast(running: str, step: int = 50) -> None:
    """About 1 GB/s, for ever within 2 GB."""
    Path(running).touch()
    blocks: list[bytes] = []
    while len(blocks) < 40:
        blocks.append(b"x" * (step * MIB))
        time.sleep(0.02)
    time.sleep(600)


def slow(running: str) -> None:
    """About 50 MB/s."""
    Path(running).touch()
    blocks: list[bytes] = []
    while True:
        blocks.append(b"x" * (5 * MIB))
        time.sleep(0.1)


def gil(running: str) -> None:
    """Memory in C with the GIL held to the end."""
    Path(running).touch()
    libc = ctypes.PyDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    libc.memset(libc.malloc(600 * MIB), 1, 600 * MIB)
    libc.sleep(600)


def run(quick: bool) -> Result:
    kills = 1 if quick else 20
    rows, figures, named, near = [], {}, 0, 0
    seen = 0
    for kind in ("fast", "slow", "gil"):
        found = isolated(kill, kind=kind, kills=kills)
        figures[kind] = found
        right = sum(one["right"] for one in found)
        ages = [one["age"] for one in found if one["age"] is not None]
        errors = [one["error"] for one in found if one["error"] is not None]
        good = sum(
            abs(one["error"]) <= WITHIN or one["age"] <= YOUNG
            for one in found
            if one["error"] is not None
        )
        named += right
        if kind != "gil":
            near, seen = near + good, seen + len(found)
        rows.append(
            [
                kind,
                f"{right} of {kills}",
                f"{100 * Spread.of(errors).median:+.1f} %" if errors else "not seen",
                f"{Spread.of(ages).show(3)} s" if ages else "-",
                f"{good} of {kills}" if kind != "gil" else "-",
            ]
        )
    return Result(
        name="kills",
        title="Killed tasks",
        how="kill -9 of a worker process with one task executing and 20 queued. The age of a peak "
        "is from its last look to the kill; with the GIL held nobody can look, so the peak may be "
        "from the task's start or not there at all.",
        tables=[
            Table(
                ["task", "right key, and no other", "last peak against RSS at the kill",
                 "its age", "within 10 % or 100 ms"],
                rows,
            )
        ],
        targets=[
            Target("kills that name the right key", "all", f"{named} of {3 * kills}",
                   named == 3 * kills),
            Target("last peak within 10 % or 100 ms, GIL free", "all", f"{near} of {seen}",
                   near == seen),
        ],
        figures=figures,
    )  # fmt: skip


def kill(*, kind: str, kills: int) -> list[dict[str, Any]]:
    """Kill a worker again and again; return what was said of each."""
    function = {"fast": fast, "slow": slow, "gil": gil}[kind]
    found = []
    settings = {
        "distributed.scheduler.allowed-failures": 0,
        # Else the cluster gives a worker up that is dead 15 s after it was dead before.
        "distributed.deploy.lost-worker-timeout": "1h",
    }
    chance = random.Random(kind)
    with (
        dask.config.set(settings),
        bench(OURS) as one,
        tempfile.TemporaryDirectory() as folder,
    ):
        events: list[dict[str, Any]] = []
        one.client.subscribe_topic("memusage", lambda event: events.append(event[1]))
        for number in range(kills):
            running = Path(folder, f"running-{number}")
            culprit = one.client.submit(function, str(running), key=f"culprit-{number}", priority=1)
            queue = one.client.map(time.sleep, [0.001] * 20, pure=False, key=f"queued{number}")
            (nanny,) = one.cluster.workers.values()
            most = {"fast": 900, "slow": 200, "gil": 590}[kind]
            until = chance.uniform(0.3, 0.9) * most if kind != "gil" else most
            # Before it runs there is nobody to name, and a nanny whose worker dies before it has
            # heard of its start gives up.
            while (
                not running.exists()
                or nanny.process.status != Status.running
                or (rss := _rss(nanny.pid)) < until * MIB
            ):
                time.sleep(0.005)
            said, killed = len(events), time.time()
            os.kill(nanny.pid, signal.SIGKILL)
            culprit.exception()
            while len(events) == said:
                time.sleep(0.01)
            one.client.gather(queue, errors="skip")
            event = events[said]
            keys = [other["key"] for other in events[said:]]
            found.append(
                {
                    "right": keys == [f"culprit-{number}"],
                    # Against the kill itself, not against when the scheduler heard of it.
                    "age": None
                    if event["peak_age"] is None
                    else killed - (event["time"] - event["peak_age"]),
                    "error": None if event["peak_bytes"] is None else event["peak_bytes"] / rss - 1,
                }
            )
    return found


def _rss(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
