"""Whose number is it: from the evidence of one window to growth, scope and reason.

The one place that decides what may be called a task's own. The rule is DESIGN's table of scopes;
the first reason that applies is given.
"""

from __future__ import annotations

from typing import NamedTuple

#: Values of ``scope``, in the order in which they are shown.
SCOPES = ("process", "shared")

#: Values of ``reason`` with what they mean, in the order in which they are asked.
REASONS = {
    "overlap": "another task ran in the process meanwhile",
    "transfer": "the worker itself moved data (transfers, spilling, (de)serialising, releases)",
    "warm_heap": "the heap held free memory at the start, or it could not be asked",
    "executor": "the task did not run on a thread of its own (coroutine, process pool)",
    "mapped": "pages of mapped files came in, which the kernel can drop at any time",
    "polling": "only sampled: the source is polling, or child processes came, went or grew",
}

#: Foreign, reusable and mapped bytes up to this much never make a number shared ...
FLOOR_BYTES = 2**20
#: ... nor up to this share of the growth.
SHARE = 0.05


class Evidence(NamedTuple):
    """All that is known of one window. Sizes in bytes."""

    start_bytes: int
    peak_bytes: int
    #: Another task, or unknown code in the process, used processor time in the window.
    overlapped: bool
    #: What the worker moved in the window.
    foreign_bytes: int
    #: The worker's helper thread (de)serialised something of unknown size.
    offloaded: bool
    #: Free in the heaps at the start; None: not known.
    reusable_bytes: int | None
    #: By how much the file-backed part of RSS rose.
    mapped_bytes: int
    #: Whether the task ran in one bracket on its own thread.
    own_thread: bool
    #: Whether the peak was seen, not sampled.
    exact: bool
    #: Whether child processes came, went or grew in the window.
    children_changed: bool


def judge(evidence: Evidence) -> tuple[int | None, str, str | None]:
    """Return ``(growth_bytes, scope, reason)``.

    ``growth_bytes`` is None unless the scope says that the number is the task's own.
    """
    growth = max(0, evidence.peak_bytes - evidence.start_bytes)
    limit = max(FLOOR_BYTES, int(growth * SHARE))
    sampled = not evidence.exact or evidence.children_changed
    reason = None
    if evidence.overlapped:
        reason = "overlap"
    elif evidence.offloaded or evidence.foreign_bytes > limit:
        reason = "transfer"
    # Where growth is out of the question anyway the heap was not asked, and is not the reason.
    elif _warm(evidence.reusable_bytes, limit, asked=evidence.own_thread and evidence.exact):
        reason = "warm_heap"
    elif not evidence.own_thread:
        reason = "executor"
    elif evidence.mapped_bytes > limit:
        reason = "mapped"
    elif sampled:
        reason = "polling"
    if reason is None:
        return growth, "process", None
    return None, "shared", reason


def _warm(reusable: int | None, limit: int, *, asked: bool) -> bool:
    return asked if reusable is None else reusable > limit
