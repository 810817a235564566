"""Whose number is it: from the evidence of one window to growth, scope and reason.

The one place that decides what may be called a task's own, by the rule that
``docs/kinds-of-task.md`` tells; the first reason that applies is given.
"""

from __future__ import annotations

#: Values of ``scope``, in the order in which they are shown.
SCOPES = ("thread", "process", "shared")

#: Values of ``reason`` with what they mean, in the order in which they are asked.
REASONS = {
    "overlap": "another task ran in the process meanwhile",
    "transfer": "the worker itself moved data (transfers, spilling, (de)serialising, releases)",
    "warm_heap": "the heap held free memory at the start, or it could not be asked",
    "executor": "the task did not run on a thread of its own (coroutine, process pool)",
    "mapped": "pages of mapped files or shared memory came in, which may be others' too",
    "polling": "only sampled: the source is polling, or child processes came, went or grew",
    "contradiction": "the thread's own count and the process's figures cannot both be",
}

#: Foreign, reusable and mapped bytes up to this much never make a number shared ...
FLOOR_BYTES = 2**20
#: ... nor up to this share of the growth.
SHARE = 0.05
#: In so many seconds a processor fills less than FLOOR_BYTES, were it all in its caches already.
BRIEF = 30e-6
#: jemalloc rounds sizes up to its classes, by so much at most.
ROUNDING = 0.25


def judge(
    *,
    start_bytes: int,
    peak_bytes: int,
    overlapped: bool,
    foreign_bytes: int,
    offloaded: bool,
    reusable_bytes: int | None,
    mapped_bytes: int,
    own_thread: bool,
    exact: bool,
    children_changed: bool,
    brief: bool = False,
    thread_bytes: int | None = None,
    freed_bytes: int = 0,
    outside_bytes: int | None = 0,
) -> tuple[int | None, str, str | None]:
    """Return ``(growth_bytes, scope, reason)`` of a window from all that is known of it.

    Parameters
    ----------
    start_bytes, peak_bytes
        RSS at the start and at its highest, children included.
    overlapped
        Another task, or unknown code in the process, used processor time in the window.
    foreign_bytes
        What the worker moved in the window.
    offloaded
        The worker's helper thread (de)serialised something of unknown size.
    reusable_bytes
        Free in the heaps at the start; None: not known.
    mapped_bytes
        By how much the file-backed part of RSS rose.
    own_thread
        Whether the task ran in one bracket on its own thread.
    exact
        Whether the peak was seen, not sampled.
    children_changed
        Whether child processes came, went or grew in the window.
    brief
        Whether it was shorter than :data:`BRIEF`: free memory in the heaps cannot have mattered.
    thread_bytes
        The peak of what the task's thread had allocated less what it had freed; None: not known.
    freed_bytes
        By how much that had fallen below its start in the end: freed of what others had allocated.
    outside_bytes
        Allocated by anybody without malloc, so not in ``thread_bytes``; None: not known.

    Returns
    -------
    growth_bytes, scope, reason
        ``growth_bytes`` is None unless the scope says that the number is the task's own;
        ``reason`` is None then.
    """
    growth = max(0, peak_bytes - start_bytes)
    limit = _limit(max(growth, thread_bytes or 0))
    reason = None
    if overlapped:
        reason = "overlap"
    elif offloaded or foreign_bytes > limit:
        reason = "transfer"
    # Where growth is out of the question anyway the heap was not asked, and is not the reason.
    elif own_thread and exact and not brief and (reusable_bytes is None or reusable_bytes > limit):
        reason = "warm_heap"
    elif not own_thread:
        reason = "executor"
    elif mapped_bytes > limit:
        reason = "mapped"
    elif not exact or children_changed:
        reason = "polling"
    if thread_bytes is not None and own_thread:
        # Where the process's growth may be others' it is no measure for the thread's count.
        small = limit if reason is None else _limit(thread_bytes)
        # More than the whole process had: most of it was never touched.
        impossible = thread_bytes > peak_bytes * (1 + ROUNDING) + FLOOR_BYTES
        if impossible or freed_bytes > small:
            reason = reason or "contradiction"
        elif not children_changed and outside_bytes is not None and outside_bytes <= small:
            # Alone, the process's figure has the task's helper threads too: what they took shows
            # in full where the heap could hide none of it.
            helped = growth - mapped_bytes > thread_bytes + limit
            if reason is None:
                return max(growth, thread_bytes), "thread", None
            if reason != "warm_heap" or not helped:
                return thread_bytes, "thread", None
    if reason is None:
        return growth, "process", None
    return None, "shared", reason


def _limit(growth: int) -> int:
    """Return how many bytes do no harm to a growth."""
    return max(FLOOR_BYTES, int(growth * SHARE))
