"""Task spans: one an execution, active on the task's own thread, ended with what was measured.

A span starts right before the task, so that what the task's own instrumentation starts is its
child. There it is no more than a note of when (see ``current``): the SDK's span is made where the
task asks for it, else by a thread of ours, and has that time. All that comes after the task
(attributes, the exception, the span's end, which a processor may hold up) is for that thread too:
neither the task's thread nor the event loop waits for it.

Covers: tasks on threads, coroutines, work in other processes (not active there), actors' calls.
Does not cover: whose provider it is (``providers``), tasks that still run when a worker closes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Token
from time import time_ns
from typing import Any, TypeAlias

from dask.typing import Key
from distributed.utils import key_split_group
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dask_memusage_exporter import __version__
from dask_memusage_exporter.aggregate import OVERFLOW, Aggregate, to_label
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.current import LazyContext
from dask_memusage_exporter.failures import Failure, tell
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.keep import Keep, children_of
from dask_memusage_exporter.providers import queue_size
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.submission import LINK

SCOPE_NAME = "dask_memusage_exporter"

#: The name of spans of prefixes that have no label of their own: names must be few.
UNNAMED = "dask.task"

#: Parents whose context is remembered: one a submission, and few are under way at once.
_MOST_PARENTS = 100

_NOTHING: Mapping[str, Any] = {}

_PREFIX_NAME = "dask.task.prefix.name"

#: Values of ``OTEL_TRACES_SAMPLER`` whose samplers look at no attributes.
_SAMPLERS = frozenset(
    {
        "",
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    }
)

#: Prefixes whose spans' names are remembered; a label that one has or has not stays so.
_MOST_NAMES = 1_000

#: What hears that the span of a record is kept: the record, its trace's id and its own.
Kept = Callable[[TaskMemory, int, int], object]

#: A span that is to end, its record if it has one, and who hears of it.
_Waiting: TypeAlias = "tuple[TaskSpan, TaskMemory | None, Kept | None]"


class TaskSpan:
    """The span of one execution. Made by :meth:`Spans.start`.

    Parameters
    ----------
    owner
        Who ends it, also where others have come after them.
    """

    __slots__ = (
        "annotations", "began", "children", "context", "done", "failure", "key", "made", "owner",
        "prefix", "token", "worker",
    )  # fmt: skip

    def __init__(self, owner: Spans, key: Key, prefix: str, task: Any, worker: Any) -> None:
        self.began = time_ns()
        self.owner, self.key, self.prefix, self.worker = owner, key, prefix, worker
        #: The task's; None: it is none, but an actor's call.
        self.annotations: Mapping[str, Any] | None = (
            None if task is None else task.annotations or _NOTHING
        )
        #: The SDK's span, once it is needed.
        self.made: Span | None = None
        #: What made it current on its thread, and takes it off again; None: it was not put there.
        self.context: Context | None = None
        self.token: Token[Context] | None = None
        self.failure: Failure | None = None
        #: Whether another span has it as its parent.
        self.children = False
        self.done = False

    def span(self) -> Span:
        """Return the SDK's span, made where it is not there yet. On any thread; never raises."""
        return self.owner.span_of(self) if self.made is None else self.made

    def leave(self) -> None:
        """Take it off this thread again, where :meth:`Spans.enter` was called."""
        token, self.token = self.token, None
        self.context = None  # which holds on to this one
        if token is not None:
            otel_context.detach(token)

    def leave_coroutine(self) -> None:
        """Take it off a coroutine's own context, which ends with the coroutine in any case."""
        # One that is never finished is closed by the garbage collector, wherever that runs.
        if otel_context.get_current() is self.context:
            self.leave()

    def fail(self, error: Any, text: str = "", traceback: str = "") -> None:
        """Take what the task raised; see :class:`Failure`."""
        self.failure = Failure(error, text, traceback)

    def finish(self, record: TaskMemory, kept: Kept | None = None) -> None:
        """End it with what was measured; see :meth:`Spans.finish`."""
        self.owner.finish(self, record, kept)

    def finish_call(
        self, worker: str, start: float, stop: float, start_bytes: int = 0, peak_bytes: int = 0
    ) -> None:
        """End it as an actor's call, which has no record; sizes are 0 where they are not known."""
        scope = "shared"
        self.owner.finish(
            self,
            TaskMemory(
                self.key, str(self.key), worker, start, stop, start_bytes, peak_bytes, None, scope,
                None, None, 0, 1, None, None, "finished", None,
            ),
        )  # fmt: skip

    def drop(self) -> None:
        """Leave it out: nothing was measured."""
        self.owner.drop(self)


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
        self._tracer: Tracer = provider.get_tracer(SCOPE_NAME, __version__)
        self._guest, self.health, self._aggregate = guest, health, aggregate
        self._task_key = settings.spans_task_key
        self._keep = Keep(settings)
        self._watch = children_of(provider) if self._keep.some else None
        # Whether the SDK's span is made before its task, with what is known then: an application's
        # processors may look at both, and other samplers than the standard ones.
        self._early = guest or os.environ.get("OTEL_TRACES_SAMPLER", "") not in _SAMPLERS
        self._names: dict[str, tuple[str, str]] = {}
        self._parents: OrderedDict[tuple[str, str], Context] = OrderedDict()
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
        if self._early:
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
            span = self._started(one)
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

    def _started(self, one: TaskSpan) -> Span:
        annotations = one.annotations or _NOTHING
        name, label = self._names.get(one.prefix) or self._name(one.prefix)
        return self._tracer.start_span(
            name,
            self._parent(annotations, "traceparent"),
            SpanKind.CONSUMER,
            {_PREFIX_NAME: label} if self._early else None,  # all else at the end
            self._links(annotations) if LINK in annotations else None,
            one.began,
        )

    def _name(self, prefix: str) -> tuple[str, str]:
        """Return the name of a prefix's spans and the prefix as an attribute, and remember them."""
        label = self._aggregate.label_of(prefix)
        known = UNNAMED if label == OVERFLOW or not label else label, to_label(prefix)
        if len(self._names) >= _MOST_NAMES:
            self._names.clear()
        self._names[prefix] = known
        return known

    def _links(self, annotations: Mapping[str, Any]) -> list[Link] | None:
        linked = get_current_span(self._parent(annotations, LINK)).get_span_context()
        return [Link(linked)] if linked.is_valid else None

    def _parent(self, annotations: Mapping[str, Any], name: str) -> Context:
        """Return the context of the span that an annotation names; an empty one without it."""
        carrier = annotations.get(name)
        if type(carrier) is not str:
            return Context()
        state = annotations.get("tracestate")
        known = carrier, state if type(state) is str else ""
        parent = self._parents.get(known)
        if parent is None:
            pair = {"traceparent": known[0], "tracestate": known[1]}
            parent = TraceContextTextMapPropagator().extract(pair, Context())
            self._parents[known] = parent
            if len(self._parents) > _MOST_PARENTS:
                with suppress(KeyError):  # another thread was faster
                    self._parents.popitem(last=False)
        return parent

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
        if getattr(span, "__dict__", _NOTHING).get("_context") is not context:
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
        of_span = (one.annotations or _NOTHING).get("span")
        attributes = {
            _PREFIX_NAME: to_label(record.task_prefix),
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
