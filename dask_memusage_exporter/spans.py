"""Task spans: one an execution, active on the task's own thread, ended with what was measured.

A span starts right before the task, so that what the task's own instrumentation starts is its
child. There it is no more than a note of when (see ``current``): the SDK's span is made where the
task asks for it, else by a thread of ours, and has that time. All that comes after the task
(attributes, the exception, the span's end, which a processor may hold up) is for that thread too:
neither the task's thread nor the event loop waits for it.

Covers: tasks on threads, coroutines, work in other processes (not active there), actors' calls.
Does not cover: what a span is called and whose child it is (``span_starter``), whose provider it is
(``providers``), tasks that still run when a worker closes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from dask.typing import Key
from distributed.utils import key_split_group
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Span,
    SpanContext,
    StatusCode,
    TraceFlags,
    TracerProvider,
    set_span_in_context,
)

from dask_memusage_exporter.aggregate import Aggregate, to_label
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.current import LazyContext
from dask_memusage_exporter.failures import tell
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.keep import Keep, children_of
from dask_memusage_exporter.providers import queue_size
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.span_starter import PREFIX_NAME, SpanStarter
from dask_memusage_exporter.task_span import NOTHING, Kept, TaskSpan

#: A span that is to end, its record if it has one, and who hears of it.
_Waiting: TypeAlias = "tuple[TaskSpan, TaskMemory | None, Kept | None]"


class Spans:
    """The spans of one process.

    Parameters
    ----------
    guest
        Whether the provider is an application's, whose resource does not name the worker.
    """

    def __init__(
        self,
        provider: TracerProvider,
        *,
        guest: bool,
        settings: Settings,
        aggregate: Aggregate,
        health: Health,
    ) -> None:
        self._pid = os.getpid()
        self._guest, self.health = guest, health
        self._starter = SpanStarter(provider, guest=guest, aggregate=aggregate)
        self._task_key = settings.spans_task_key
        self._keep = Keep(settings)
        self._watch = children_of(provider) if self._keep.some else None
        # As many wait as the SDK lets wait, for a processor that holds them up.
        self._most = queue_size()
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        # Held while the SDK's span of a task is made. The garbage collector may run then, and with
        # it somebody's finalizer that asks for another's.
        self._making = threading.RLock()
        self._closed = False
        self._thread = threading.Thread(target=self._end_all, name="memusage-spans", daemon=True)
        self._thread.start()

    # -- on the task's thread ------------------------------------------------------------

    def start(self, key: Key, prefix: str, task: Any, worker: Any) -> TaskSpan | None:
        """Start a span, in nobody's context but its parent's; None in a forked child.

        Parameters
        ----------
        task
            The worker's TaskState; None for actors' methods.
        worker
            The worker's name.
        """
        if os.getpid() != self._pid:
            return None
        one = TaskSpan(self, key, prefix, task, worker)
        if self._starter.early:
            self._make(one)
        return one

    def enter(self, one: TaskSpan) -> None:
        """Make it the current span of this thread."""
        one.context = (
            LazyContext(one.span) if one.made is None else set_span_in_context(one.made, Context())
        )
        one.token = otel_context.attach(one.context)

    def clear(self) -> None:
        """Let nothing be current on this thread, where a span was never taken off."""
        otel_context.attach(Context())

    # -- wherever the SDK's span is first needed -----------------------------------------

    def span_of(self, one: TaskSpan) -> Span:
        """Return the SDK's span, made once. On any thread; never raises."""
        if os.getpid() != self._pid:
            return INVALID_SPAN  # nobody would end it, and who was making one is not here any more
        with self._making:
            return self._make(one) if one.made is None else one.made

    def _make(self, one: TaskSpan) -> Span:
        """Start the SDK's span, as of when the task began. Never raises."""
        # What the SDK says or counts meanwhile is in no span, least of all in this one.
        token = otel_context.attach(Context())
        try:
            span = self._starter.start(one)
        except Exception as error:
            self.health.error("export", error)
            span = INVALID_SPAN
        finally:
            otel_context.detach(token)
        if self._watch is not None:
            self._watch.open[span.get_span_context().span_id] = one
        one.made = span
        if one.done:  # before anybody asked
            self._unwatch(one)
        return span

    # -- on the event loop ---------------------------------------------------------------

    def finish(self, one: TaskSpan, record: TaskMemory, kept: Kept | None = None) -> None:
        """End it with what was measured, later and elsewhere. Once; never raises, never waits.

        ``kept`` is called there, where the span is sampled and kept.
        """
        if one.done:
            return
        self._forget(one)
        if one.made is not None and not one.made.is_recording():
            return  # not sampled, or ended by the task itself
        if self._has_room():
            self._waiting.put((one, record, kept))
        else:
            self._lose(one)

    def drop(self, one: TaskSpan) -> None:
        """Leave it out, later and elsewhere. Never raises, never waits."""
        if one.done:
            return
        self._forget(one)
        if self._guest and self._has_room():
            self._waiting.put((one, None, None))

    def _has_room(self) -> bool:
        return not self._closed and self._waiting.qsize() < self._most

    def _lose(self, one: TaskSpan) -> None:
        if one.span().is_recording():  # else nobody would have had it
            self.health.drop("span_export")
        one.failure = None

    def _forget(self, one: TaskSpan) -> None:
        """Wait for it no longer."""
        one.done = True
        if one.made is not None:
            self._unwatch(one)

    def _unwatch(self, one: TaskSpan) -> None:
        if self._watch is not None and one.made is not None:
            self._watch.open.pop(one.made.get_span_context().span_id, None)

    # -- the end -------------------------------------------------------------------------

    def close(self) -> None:
        """End what waits, for as long as that takes, and the thread with it. Harmless twice."""
        if not self._closed:
            self._closed = True
            self._waiting.put(None)
        self._thread.join()

    def give_up(self) -> None:
        """End nothing any more: what waits is lost."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                if (waiting := self._waiting.get_nowait()) is not None:
                    self._lose(waiting[0])
        self._waiting.put(None)  # for the thread, if it ever comes back

    def _end_all(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            try:
                one, record, kept = waiting
                if record is not None and self._is_kept(one, record):
                    self._end(one, record, kept)
                else:
                    self._leave_out(one, record)
            except Exception as error:
                self.health.drop("span_export")
                self.health.error("export", error)
            one.failure = None  # a context of the task's may hold on to its span
            del waiting, one

    def _is_kept(self, one: TaskSpan, record: TaskMemory) -> bool:
        if self._keep.compares and not one.span().is_recording():
            return False  # it takes no other's place
        # Without a look at every span that starts nobody knows which are parents: then all stay.
        unsure = self._keep.some and self._watch is None
        return self._keep.wants(record, one.failure) or one.children or unsure

    def _leave_out(self, one: TaskSpan, record: TaskMemory | None) -> None:
        """End it for an application's own processors, which have heard of its start.

        As one that is recorded and not sampled, of which the specification says that processors
        receive it and exporters do not: https://opentelemetry.io/docs/specs/otel/trace/sdk/#sampling
        """
        if not self._guest:
            return
        span: Any = one.span()
        context: SpanContext = span.get_span_context()
        # A sampler says so at a span's start, and nothing public says it later; another SDK's span
        # stays open, and so does one that only passes on what it is asked to one of this SDK's.
        if getattr(span, "__dict__", NOTHING).get("_context") is not context:
            return
        if record is not None:
            span.set_attributes(self._attributes(one, record))
        flags = TraceFlags(context.trace_flags & ~TraceFlags.SAMPLED)
        span._context = SpanContext(
            context.trace_id, context.span_id, context.is_remote, flags, context.trace_state
        )
        span.end(None if record is None else int(record.stop * 1e9))

    def _end(self, one: TaskSpan, record: TaskMemory, kept: Kept | None) -> None:
        span = one.span()
        if not span.is_recording():
            return
        span.set_attributes(self._attributes(one, record))
        stop = int(record.stop * 1e9)
        if one.failure is not None:
            kind, message = one.failure.told()
            span.set_attribute("error.type", kind)
            span.set_status(StatusCode.ERROR, f"{kind}: {message}")
            tell(span, kind, message, one.failure.traceback, stop)
        span.end(stop)
        context = span.get_span_context()
        if kept is not None and context.trace_flags.sampled:  # not only recorded
            try:
                kept(record, context.trace_id, context.span_id)
            except Exception as error:  # the span itself is not lost
                self.health.error("export", error)

    def _attributes(self, one: TaskSpan, record: TaskMemory) -> dict[str, Any]:
        is_task = one.annotations is not None
        of_span = (one.annotations or NOTHING).get("span")
        attributes = {
            PREFIX_NAME: to_label(record.task_prefix),
            "dask.task.key": to_label(str(one.key)) if self._task_key else None,
            "dask.task.group.name": to_label(str(key_split_group(one.key))) if is_task else None,
            "dask.task.memory.peak": record.peak_bytes or None,
            "dask.task.memory.growth": record.growth_bytes,
            "dask.task.memory.start": record.start_bytes or None,
            "dask.task.memory.scope": record.scope,
            "dask.task.concurrency": record.concurrency,
            "dask.task.input.size": record.input_bytes,
            "dask.task.output.size": record.output_bytes,
            "dask.span.id": record.span_id,
            # Dask's own span: {"name": tags, "ids": ...}.
            "dask.span.tags": of_span.get("name") if isinstance(of_span, Mapping) else None,
        }
        if self._guest or record.worker.startswith("inproc:"):  # no resource says it
            attributes["dask.worker.address"] = record.worker
            attributes["dask.worker.name"] = str(one.worker)
        return {name: value for name, value in attributes.items() if value not in (None, "")}
