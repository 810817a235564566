"""Sources of peaks: the kernel's mark and its self-test, the fallback, clocks of threads."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dask_memusage_exporter import measure
from dask_memusage_exporter.measure import threads
from dask_memusage_exporter.measure.highwater import KernelSource, Source
from dask_memusage_exporter.measure.polling import PollingSource
from tests.conftest import wait_until
from tests.test_tracker import burn, touch

MIB = 2**20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A directory that looks like /proc/self of a sandbox: the files are there and do nothing."""
    for name in ("status", "statm"):
        shutil.copyfile(f"/proc/self/{name}", tmp_path / name)
    (tmp_path / "clear_refs").touch()
    return tmp_path


@pytest.mark.parametrize("make", [KernelSource, PollingSource])
def test_reading(make: Callable[[], Source]) -> None:
    """A source tells RSS now, and the kernel's tells the peak since the reset."""
    source = make()
    rss, faults = source.reset()
    block = touch(64)
    assert source.read().rss == pytest.approx(rss + 64 * MIB, abs=2 * MIB)
    block.close()
    peak = source.read().peak
    assert peak == pytest.approx(rss + (64 * MIB if source.exact else 0), abs=2 * MIB)
    assert (source.faults() > faults) == source.exact
    again, _ = source.reset()
    assert source.read().peak == pytest.approx(again, abs=2 * MIB)
    assert 0 < source.mapped() < rss
    source.close()


def test_reset_that_does_nothing(proc: Path) -> None:
    """A kernel that takes the reset but does not act on it is found out."""
    with pytest.raises(OSError, match="VmHWM does not follow"):
        KernelSource(str(proc))


@pytest.mark.parametrize("name", ["clear_refs", "statm", "status"])
def test_missing_file(name: str, proc: Path) -> None:
    """So is one that lacks a file; nothing stays open."""
    (proc / name).unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=name):
        KernelSource(str(proc))
    assert len(os.listdir("/proc/self/fd")) == before


def test_mark_that_is_not_there(proc: Path) -> None:
    """And one without the mark."""
    (proc / "status").write_text("Name: x\n")
    with pytest.raises(OSError, match="there is no VmHWM"):
        KernelSource(str(proc))


def test_choice(monkeypatch: pytest.MonkeyPatch, proc: Path) -> None:
    """The best that works is chosen; where it does not the reason is in the log's words."""
    assert measure.choose("auto", kernel_reset=True).source.name == "kernel"
    for source, kernel_reset, why in (
        ("polling", True, "set by memusage.source"),
        ("auto", False, "memusage.kernel-reset is off"),
    ):
        chosen = measure.choose(source, kernel_reset=kernel_reset)
        assert chosen.name == chosen.source.name == "polling"
        assert chosen.why.startswith(why)
    monkeypatch.setattr(measure, "KernelSource", lambda: KernelSource(str(proc)))
    chosen = measure.choose("kernel", kernel_reset=True)
    assert chosen.name == "polling"
    assert chosen.why.startswith("sampled: the high-water mark cannot be used (clear_refs: ")


def test_closed_source() -> None:
    """A closed source touches no file: its number may be somebody else's."""
    source = KernelSource()
    source.close()
    with pytest.raises(OSError, match="clear_refs"):
        source.reset()
    with pytest.raises(OSError, match="statm"):
        source.mapped()


def test_clocks() -> None:
    """A thread's clock runs while it works, stands still while it waits, and ends with it."""
    go, stop = threading.Event(), threading.Event()
    clocks: list[int | None] = []

    def work() -> None:
        clocks.append(threads.clock_of(threading.get_ident()))
        burn()
        go.set()
        stop.wait()

    thread = threading.Thread(target=work)
    thread.start()
    go.wait()
    (clock,) = clocks
    used = threads.cpu_ns(clock)
    assert used >= 20 * threads.IDLE_NS
    burn()
    assert threads.cpu_ns(clock) - used < threads.IDLE_NS
    stop.set()
    thread.join()
    # The kernel takes it off a moment after Python has.
    wait_until(lambda: threads.cpu_ns(clock) is None)
    assert threads.clock_of(None) is threads.cpu_ns(None) is None


def test_own_usage() -> None:
    """A thread's page faults and processor time are its own."""
    faults, used = threads.own_usage()
    burn()
    block = touch(16)
    more_faults, more_used = threads.own_usage()
    assert more_faults - faults >= 4000
    assert more_used - used >= 20 * threads.IDLE_NS
    other = threading.Thread(target=lambda: touch(16).close())
    other.start()
    other.join()
    assert threads.own_usage()[0] - more_faults < 1000
    block.close()
