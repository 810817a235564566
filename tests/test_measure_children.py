"""Child processes, by real ones: what they hold, what they held, that they were there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dask_memusage_exporter.measure.children import Children
from tests.conftest import wait_until
from tests.test_tracker import touch

#: What children this process has is the question here.
pytestmark = pytest.mark.usefixtures("childless")

MIB = 2**20

#: A program that obeys: "64" holds that many MiB more, "0" lets all go, nothing ends it.
OBEYS = """
import mmap, sys
held = []
print(flush=True)
for line in sys.stdin:
    if int(line):
        held.append(mmap.mmap(-1, int(line) * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        for offset in range(0, len(held[-1]), 4096):
            held[-1][offset] = 1
    else:
        while held:
            held.pop().close()
    print(flush=True)
"""


class Child:
    """A process that runs :data:`OBEYS`."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command or [sys.executable, "-c", OBEYS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.process.stdout.readline()

    def hold(self, mib: int) -> None:
        """Hold so much more; 0: let all go."""
        self.process.stdin.write(f"{mib}\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def end(self) -> None:
        """End it and wait for it."""
        self.process.communicate()


@pytest.fixture
def child() -> Iterator[Child]:
    """One child that obeys."""
    child = Child()
    yield child
    child.end()


def looked(children: Children) -> int:
    """Look until children are listed, and once more; return the last answer."""
    wait_until(lambda: children.look(0) and children._known)
    return children.look(0)


def test_none() -> None:
    """Without children nothing is held, and nothing changes."""
    children = Children()
    assert (children.look(0), children.rss, children.changes) == (0, 0, 0)
    assert not children.unseen()


def test_holds(child: Child) -> None:
    """What a child holds counts from the second look at it, and each rise is a change."""
    children = Children()
    before = looked(children)
    assert children.rss == before > MIB
    changes = children.changes
    assert children.look(0) == before
    assert children.changes == changes
    child.hold(64)
    assert children.look(0) == children.rss == pytest.approx(before + 64 * MIB, abs=MIB)
    assert children.changes > changes


def test_spike_between_two_looks(child: Child) -> None:
    """A spike of a child that lives on is seen by its own high-water mark, once."""
    children = Children()
    before = looked(children)
    child.hold(64)
    child.hold(0)
    assert children.look(0) == pytest.approx(before + 64 * MIB, abs=MIB)
    assert children.rss == pytest.approx(before, abs=MIB)
    assert children.look(0) == pytest.approx(before, abs=MIB)


def test_peak_of_an_old_child(child: Child) -> None:
    """A peak from before the first look belongs to the past, if that look came late."""
    child.hold(64)
    child.hold(0)
    assert looked(Children()) < 64 * MIB


def test_refresh(child: Child) -> None:
    """What a child has let go, and that it has ended, is not in the next task's figures."""
    children = Children()
    before = looked(children)
    child.hold(64)
    children.look(0)
    child.hold(0)
    children.refresh()
    assert children.rss == pytest.approx(before, abs=MIB)
    changes = children.changes
    child.end()
    children.refresh()
    assert children.rss == 0
    after = children.changes
    assert after > changes
    # The next look, which finds it gone, does not find that once more.
    children.look(0)
    assert children.changes == after


def test_refresh_sees_what_was_taken(child: Child) -> None:
    """Between two looks too: what a child took is a change, and a new peak counts, once."""
    children = Children()
    before = looked(children)
    changes = children.changes
    assert children.refresh() == pytest.approx(before, abs=MIB)
    assert children.changes == changes
    child.hold(64)
    child.hold(0)
    assert children.refresh() == pytest.approx(before + 64 * MIB, abs=MIB)
    assert children.rss == pytest.approx(before, abs=MIB)
    assert children.refresh() == pytest.approx(before, abs=MIB)
    # Below its old peak: what it holds now counts, and what it no longer holds was a change.
    for held, sizes in ((32, (32,)), (0, (0, 16, 0))):
        changes = children.changes
        for size in sizes:
            child.hold(size)
        assert children.refresh() == pytest.approx(before + held * MIB, abs=MIB)
        assert children.changes > changes


def test_unseen(child: Child) -> None:
    """A child that came since the last look is known to be there, beside those that were."""
    children = Children()
    assert children.unseen()
    looked(children)
    assert not children.unseen()
    other = os.spawnl(os.P_NOWAIT, "/bin/true", "true")
    wait_until(lambda: b") Z " in Path(f"/proc/{other}/stat").read_bytes())
    # Even where it has ended, if nobody has waited for it.
    assert children.unseen()
    changes = children.changes
    wait_until(lambda: children.look(0) and children.changes > changes)
    assert not children.unseen()
    reaped = Children.reaped()
    os.waitpid(other, 0)
    assert Children.reaped() > reaped


def test_grandchildren() -> None:
    """Descendants of children count."""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {OBEYS!r}])"
    child = Child(sys.executable, "-c", parent)
    children = Children()
    before = looked(children)
    child.hold(64)
    assert children.look(0) == pytest.approx(before + 64 * MIB, abs=MIB)
    child.end()


def test_forked_child() -> None:
    """What a forked child shares with its parent counts once; what it touches counts."""
    held = touch(32)
    ready, go, done = os.pipe(), os.pipe(), os.pipe()
    own = own_anonymous()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            block = touch(64)
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            block.close()
        finally:
            os._exit(0)
    try:
        children = Children()
        os.read(ready[0], 1)
        wait_until(lambda: children.look(own) is not None and children._known)
        assert children.look(own) < 8 * MIB
        os.write(go[1], b"x")
        os.read(ready[0], 1)
        assert children.look(own) == pytest.approx(64 * MIB, abs=8 * MIB)
        os.write(done[1], b"x")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    held.close()
    for end in (*ready, *go, *done):
        os.close(end)


def own_anonymous() -> int:
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_same_command_line() -> None:
    """A child that runs the very command of its parent is no forked one: all of it counts.

    A worker and what it spawns by multiprocessing may have the same command line.
    """
    code = """
import subprocess, sys, time
from dask_memusage_exporter.measure.children import Children
if sys.stdin.read(1) == "p":  # the parent; its child waits for its input's end
    command = open("/proc/self/cmdline").read().split("\\0")[:-1]
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    children, end = Children(), time.monotonic() + 20
    while children.look(10**12) < 2**20 and time.monotonic() < end:
        time.sleep(0.01)
    print(children.rss)
    child.communicate()
"""
    printed = subprocess.run(
        [sys.executable, "-c", code],
        input="p",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert int(printed) > MIB
