"""Measuring: where peaks come from, whose they are. Knows neither Dask nor exporters."""

from __future__ import annotations

from dask_memusage_exporter.measure.highwater import KernelSource, Source
from dask_memusage_exporter.measure.polling import PollingSource


def choose(source: str, *, kernel_reset: bool) -> tuple[Source, str]:
    """Return the source to use in this process and why, for the log.

    Parameters
    ----------
    source
        ``auto``, ``kernel`` or ``polling``, as in the setting ``memusage.source``.
    kernel_reset
        The setting ``memusage.kernel-reset``.

    Returns
    -------
    source, reason
        Always a source that works: where what was asked for does not, polling, and the reason
        says what was in the way.
    """
    if source == "polling":
        return PollingSource(), "set by memusage.source"
    if not kernel_reset:
        return PollingSource(), "memusage.kernel-reset is off"
    try:
        return KernelSource(), "exact: the kernel's high-water mark can be reset"
    except (OSError, AttributeError, ValueError) as error:
        return PollingSource(), f"sampled: the high-water mark cannot be used ({error})"
