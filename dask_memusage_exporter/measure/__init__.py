"""Measuring: where peaks come from, whose they are. Knows neither Dask nor exporters."""

from __future__ import annotations

from typing import NamedTuple

from dask_memusage_exporter.measure.highwater import KernelSource, Source
from dask_memusage_exporter.measure.jemalloc import ThreadPeak
from dask_memusage_exporter.measure.polling import PollingSource


class Chosen(NamedTuple):
    """Where the peaks of this process come from."""

    #: The value of the label ``source``.
    name: str
    #: Of the process; one that works, always.
    source: Source
    #: Of each thread; None: not known.
    thread_peak: ThreadPeak | None
    #: For the log: what was found, and what was in the way of better.
    why: str


def choose(source: str, *, kernel_reset: bool) -> Chosen:
    """Return the best that works in this process.

    Parameters
    ----------
    source
        ``auto``, ``jemalloc``, ``kernel`` or ``polling``, as in the setting ``memusage.source``.
    kernel_reset
        The setting ``memusage.kernel-reset``.
    """
    process, why = _process(source, kernel_reset=kernel_reset)
    if source in ("kernel", "polling"):
        return Chosen(process.name, process, None, why)
    try:
        thread_peak = ThreadPeak()
    except OSError as error:
        return Chosen(process.name, process, None, f"{why}; tasks that overlap share it: {error}")
    own = f"each thread's own peak by jemalloc {thread_peak.version}"
    return Chosen("jemalloc", process, thread_peak, f"{own}; {why}")


def _process(source: str, *, kernel_reset: bool) -> tuple[Source, str]:
    if source == "polling":
        return PollingSource(), "set by memusage.source"
    if not kernel_reset:
        return PollingSource(), "memusage.kernel-reset is off"
    try:
        return KernelSource(), "exact: the kernel's high-water mark can be reset"
    except (OSError, AttributeError, ValueError) as error:
        return PollingSource(), f"sampled: the high-water mark cannot be used ({error})"
