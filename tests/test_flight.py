"""The flight file: whole after any kill, read once, by whoever comes after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dask_memusage_exporter import deaths, flight
from tests.conftest import wait_until

pytestmark = pytest.mark.ends

HOLDER = """
import sys, time
from dask_memusage_exporter import deaths, flight
process = {"incarnation": "i", "scheduler_id": "S", "worker": "w"}
file = flight.FlightFile(sys.argv[1], process)
key = ("x", 1)
slot = file.begin(key, 100.0)
file.states[slot] = flight.RUNS
file.update(slot, key, start=100.0, start_bytes=10, peak_bytes=2**40, concurrency=3)
gone = file.begin("gone", 1.0)
file.states[gone] = flight.RUNS
file.end(gone)
waits = file.begin("waits for a thread", 1.0)
done = file.begin("done", 1.0)
file.states[done] = flight.RUNS
file.states[done] = flight.WAITS
file.count(7)
exec(sys.argv[2])
print("i", flush=True)
time.sleep(600)
"""


PROCESS = {"incarnation": "i", "scheduler_id": "S"}


def _hold(directory: Path, more: str = "") -> tuple[subprocess.Popen, str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), more], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    return holder, holder.stdout.readline().strip()


def _end(holder: subprocess.Popen) -> None:
    holder.kill()
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


def test_a_killed_process_leaves_what_it_ran(tmp_path: Path) -> None:
    """After kill -9 the file tells process, running tasks, their last peak, and the counts."""
    holder, incarnation = _hold(tmp_path)
    assert flight.salvage(str(tmp_path), "S") == []  # it lives
    _end(holder)
    before = time.time()
    (wreck,) = flight.salvage(str(tmp_path), "S")
    assert wreck.process["incarnation"] == incarnation
    assert wreck.process["pid"] == holder.pid
    assert (wreck.observed, wreck.left_out) == (7, 0)
    (task,) = wreck.tasks
    assert task.key == "('x', 1)"
    assert task.digest == flight.digest_of(("x", 1)) != flight.digest_of("('x', 1)")
    assert (task.start, task.start_bytes, task.peak_bytes, task.concurrency) == (100, 10, 2**40, 3)
    assert before - 60 < task.peak_time <= before


def test_a_wreck_is_read_once(tmp_path: Path) -> None:
    """Who reads a file takes it away: nothing is reported twice."""
    _end(_hold(tmp_path)[0])
    assert len(flight.salvage(str(tmp_path), "S")) == 1
    assert flight.salvage(str(tmp_path), "S") == []
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_schedulers_are_left_until_they_are_stale(tmp_path: Path) -> None:
    """Clusters that share a directory do not read each other's, and old ones are swept away."""
    _end(_hold(tmp_path)[0])
    assert flight.salvage(str(tmp_path), "another") == []
    (file,) = tmp_path.iterdir()
    old = time.time() - flight.STALE_SECONDS - 1
    os.utime(file, (old, old))
    assert flight.salvage(str(tmp_path), "another") == []
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_keep_a_dead_parent_alive(tmp_path: Path) -> None:
    """The lock goes with the process that made the file, though a child of it lives on."""
    fork = "import os\npid = os.fork()\nif pid == 0:\n    time.sleep(600)\nprint(pid, flush=True)"
    holder, child = _hold(tmp_path, fork)
    _end(holder)
    try:
        # The child may not have had its turn yet.
        assert len(wait_until(lambda: flight.salvage(str(tmp_path), "S"))) == 1
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_process_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    """close() takes the file away."""
    file = flight.FlightFile(str(tmp_path), PROCESS)
    assert os.listdir(tmp_path) == [f"i{flight.SUFFIX}"]
    file.close()
    assert os.listdir(tmp_path) == []


def test_broken_files_are_no_error(tmp_path: Path) -> None:
    """A file that is cut or garbage is passed over."""
    (tmp_path / "a.flight").write_bytes(b"")
    (tmp_path / "b.flight").write_bytes(b"dask-memusage flight 2\n" + b"\xff" * 5000)
    assert flight.salvage(str(tmp_path), "S") == []
    assert flight.salvage(str(tmp_path / "missing"), "S") == []


def test_more_tasks_than_slots_are_left_out(tmp_path: Path) -> None:
    """A full file is no error, and a slot that ends is used again."""
    file = flight.FlightFile(str(tmp_path), PROCESS)
    slots = [file.begin(f"x-{number}", 0.0) for number in range(flight.SLOTS)]
    assert None not in slots
    assert [file.begin(f"more-{number}", 0.0) for number in range(3)] == [None] * 3
    file.end(None)
    file.end(slots[3])
    assert file.begin("one-more", 0.0) == slots[3]
    file.count(5)
    file.forget()
    (wreck,) = flight.salvage(str(tmp_path), "S")
    assert (wreck.observed, wreck.left_out) == (5, 2)


@pytest.mark.parametrize("key", ["x", "x" * 10_000, "ключ" * 1000, "\udcff", 'a\n"b"', ("t", 1)])
def test_any_key_fits(tmp_path: Path, key: object) -> None:
    """Long keys are cut between characters; odd ones are readable text."""
    file = flight.FlightFile(str(tmp_path), PROCESS)
    text = flight.text_of(key)
    slot = file.begin(key, 0.0)
    assert slot is not None
    file.states[slot] = flight.RUNS
    file.forget()
    (wreck,) = flight.salvage(str(tmp_path), "S")
    assert wreck.tasks[0].key == text
    assert wreck.tasks[0].digest == flight.digest_of(key)
    assert text == str(key)[: len(text)].encode("utf-8", "replace").decode()


def test_an_update_after_the_end_brings_nothing_back(tmp_path: Path) -> None:
    """The sampler may be late: neither is a task revived, nor the next one given its figures."""
    file = flight.FlightFile(str(tmp_path), PROCESS)
    late = {"start": 1.0, "start_bytes": 1, "peak_bytes": 1, "concurrency": 1}
    slot = file.begin("x", 0.0)
    assert slot is not None
    file.end(slot)
    file.update(slot, "x", **late)
    assert file.begin("next", 5.0) == slot
    file.states[slot] = flight.RUNS
    file.update(slot, "x", **late)
    file.forget()
    (wreck,) = wait_until(lambda: flight.salvage(str(tmp_path), "S"))
    ((key, start, start_bytes, *_),) = wreck.tasks
    assert (key, start, start_bytes) == ("next", 5.0, 0)


@pytest.mark.parametrize(("cgroup", "kills"), [("same", 2), ("another", None)])
def test_kills_of_another_cgroup_are_not_its_own(
    cgroup: str, kills: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads counts what the kernel has killed only where it is in the same cgroup."""
    monkeypatch.setattr(flight, "oom_kills", lambda: 1)
    monkeypatch.setattr(flight, "cgroup", lambda: "same")
    flight.FlightFile(str(tmp_path), PROCESS).forget()
    monkeypatch.setattr(flight, "oom_kills", lambda: 3)
    monkeypatch.setattr(flight, "cgroup", lambda: cgroup)
    (wreck,) = flight.salvage(str(tmp_path), "S")
    assert wreck.oom_kills == kills


def test_what_a_newer_version_tells() -> None:
    """Workers and nannies may be newer than their scheduler: what it does not know is left out."""
    flying = flight.Flying("x", 1.0, 2, 3, 4.0, 5, b"digest")
    assert flight.Flying.of([*flying, "more"]) == flying
    assert flight.Flying.of(list(flying[:-1])) == flying._replace(digest=b"")
    wreck = flight.Wreck({"incarnation": "i"}, [flying], 1, 0, None, 2.0)
    assert deaths._wreck([wreck[0], [[*flying, "more"]], *wreck[2:], "more"]) == wreck
