"""Task spans: one an execution, active on the task's own thread, ended with what was measured.

A span is started right before the task, so that what the task's own instrumentation starts is its
child. All that comes after the task (attributes, the exception, the span's end, which a processor
may hold up) is for a thread of ours: neither the task's thread nor the event loop waits for it.

Covers: tasks on threads, coroutines and work in other processes (not active there), actors' calls.
Does not cover: whose provider it is (``providers``), tasks that still run when a worker closes.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import Token
from typing import Any, NamedTuple

from dask.typing import Key
from distributed.protocol import pickle
from distributed.utils import key_split_group
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    SpanKind,
    StatusCode,
    Tracer,
    TracerProvider,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dask_memusage_exporter import __version__
from dask_memusage_exporter.aggregate import OVERFLOW, Aggregate, to_label
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.health import Health
from dask_memusage_exporter.providers import queue_size
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.submission import LINK

SCOPE_NAME = "dask_memusage_exporter"

#: The name of spans of prefixes that have no label of their own: names must be few.
UNNAMED = "dask.task"

#: Parents whose context is remembered: one a submission, and few are under way at once.
_MOST_PARENTS = 100

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

#: Whether an exception is told by a span event beside the log record, as the semantic conventions
#: name it; the log record alone is what they want.
_OPT_IN = "OTEL_SEMCONV_EXCEPTION_SIGNAL_OPT_IN"


#: What hears that the span of a record is kept: the record, its trace's id and its own.
Kept = Callable[[TaskMemory, int, int], object]


class Failure(NamedTuple):
    """What a task raised, as it is at hand: to unpickle it may take time and run others' code."""

    #: The exception, or its pickle.
    error: Any
    #: Its ``repr``, and its traceback; empty where they are not known.
    text: str
    traceback: str

    def told(self) -> tuple[str, str]:
        """Return the exception's type, as the semantic conventions name it, and its message."""
        error = self.error
        if isinstance(error, (bytes, bytearray, memoryview)):
            try:
                error = pickle.loads(error)
            except BaseException:  # whatever a user's class does: this thread must live
                error = None
        if not isinstance(error, BaseException):
            return self.text.partition("(")[0] or "_OTHER", self.text
        kind = type(error)
        name = kind.__qualname__
        return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}", str(error)


class TaskSpan:
    """The span of one execution. Made by :meth:`Spans.start`.

    Parameters
    ----------
    owner
        Who ends it, also where others have come after them.
    """

    __slots__ = ("children", "done", "failure", "key", "owner", "span", "task", "token", "worker")

    def __init__(self, owner: Spans, span: Any, key: Key, task: Any, worker: Any) -> None:
        self.owner, self.span = owner, span
        self.key, self.task, self.worker = key, task, worker
        #: What takes the span off its thread again; None: it was not put there.
        self.token: Token[Context] | None = None
        self.failure: Failure | None = None
        #: Whether another span has it as its parent.
        self.children = False
        self.done = False

    def leave(self) -> None:
        """Take it off this thread again, where :meth:`Spans.enter` was called."""
        token, self.token = self.token, None
        if token is not None:
            otel_context.detach(token)

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
        """Forget it: nothing was measured."""
        self.owner.forget(self)


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
        self._watch = _children_of(provider) if self._keep.some else None
        # Samplers and an application's processors may look at it; the standard samplers do not, and
        # attributes are a fifth of what it takes to start a span.
        self._early = guest or os.environ.get("OTEL_TRACES_SAMPLER", "") not in _SAMPLERS
        self._names: dict[str, tuple[str, str]] = {}
        self._parents: OrderedDict[tuple[str, str], Context] = OrderedDict()
        # As many wait as the SDK lets wait, for a processor that holds them up.
        most = queue_size()
        self._waiting: queue.Queue[tuple[TaskSpan, TaskMemory, Kept | None] | None] = queue.Queue(
            most
        )
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
        annotations = getattr(task, "annotations", None) or {}
        name, label = self._names.get(prefix) or self._name(prefix)
        span = self._tracer.start_span(
            name,
            self._parent(annotations, "traceparent"),
            SpanKind.CONSUMER,
            {_PREFIX_NAME: label} if self._early else None,  # all else at the end
            self._links(annotations) if LINK in annotations else None,
        )
        one = TaskSpan(self, span, key, task, worker)
        if self._watch is not None:
            self._watch.open[span.get_span_context().span_id] = one
        return one

    def _name(self, prefix: str) -> tuple[str, str]:
        """Return the name of a prefix's spans and the prefix as an attribute, and remember them."""
        label = self._aggregate.label_of(prefix)
        known = UNNAMED if label == OVERFLOW or not label else label, to_label(prefix)
        if len(self._names) >= _MOST_NAMES:
            self._names.clear()
        self._names[prefix] = known
        return known

    def enter(self, one: TaskSpan) -> None:
        """Make it the current span of this thread."""
        one.token = otel_context.attach(set_span_in_context(one.span, Context()))

    def clear(self) -> None:
        """Let nothing be current on this thread, where a span was never taken off."""
        otel_context.attach(Context())

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
        self.forget(one)
        if not one.span.is_recording():
            return  # not sampled
        try:
            if self._closed:
                raise queue.Full
            self._waiting.put_nowait((one, record, kept))
        except queue.Full:
            self.health.drop("span_export")

    def forget(self, one: TaskSpan) -> None:
        """Wait for it no longer."""
        one.done = True
        if self._watch is not None:
            self._watch.open.pop(one.span.get_span_context().span_id, None)

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
                if self._waiting.get_nowait() is not None:
                    self.health.drop("span_export")
        with suppress(queue.Full):
            self._waiting.put_nowait(None)  # for the thread, if it ever comes back

    def _end_all(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            try:
                self._end(*waiting)
            except Exception as error:
                self.health.drop("span_export")
                self.health.error("export", error)
            del waiting  # it holds the task's exception

    def _end(self, one: TaskSpan, record: TaskMemory, kept: Kept | None) -> None:
        # Without a look at every span that starts nobody knows which are parents: then all stay.
        unsure = self._keep.some and self._watch is None
        if not (self._keep.wants(record, one.failure) or one.children or unsure):
            return
        span = one.span
        span.set_attributes(self._attributes(one, record))
        stop = int(record.stop * 1e9)
        if one.failure is not None:
            kind, message = one.failure.told()
            span.set_attribute("error.type", kind)
            span.set_status(StatusCode.ERROR, f"{kind}: {message}")
            _tell(span, kind, message, one.failure.traceback, stop)
        span.end(stop)
        context = span.get_span_context()
        if kept is not None and context.trace_flags.sampled:  # not only recorded
            try:
                kept(record, context.trace_id, context.span_id)
            except Exception as error:  # the span itself is not lost
                self.health.error("export", error)

    def _attributes(self, one: TaskSpan, record: TaskMemory) -> dict[str, Any]:
        annotations = getattr(one.task, "annotations", None) or {}
        of_span = annotations.get("span")
        attributes = {
            _PREFIX_NAME: to_label(record.task_prefix),
            "dask.task.key": to_label(str(one.key)) if self._task_key else None,
            "dask.task.group.name": to_label(str(key_split_group(one.key))) if one.task else None,
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


class Keep:
    """Which spans are kept once it is known what was measured: all, or those that stand out."""

    def __init__(self, settings: Settings) -> None:
        self._peak, self._growth = settings.spans_keep_peak, settings.spans_keep_growth
        self._most, self._window = settings.spans_keep_largest, settings.maximum_window
        #: Whether any are left out.
        self.some = bool(self._peak or self._growth or self._most)
        self._largest: dict[tuple[str, bool], list[tuple[int, float]]] = {}

    def wants(self, record: TaskMemory, failure: Failure | None) -> bool:
        """Return whether to keep the span of an execution that had no children."""
        if not self.some or failure is not None or record.status == "erred":
            return True
        peak, growth = record.peak_bytes, record.growth_bytes
        kept = bool(self._peak) and peak >= (self._peak or 0)
        kept |= bool(self._growth) and growth is not None and growth >= (self._growth or 0)
        if self._most:
            kept |= self._among_largest((record.task_prefix, False), peak, record.stop)
            if growth is not None:
                kept |= self._among_largest((record.task_prefix, True), growth, record.stop)
        return kept

    def _among_largest(self, kind: tuple[str, bool], value: int, now: float) -> bool:
        """Return whether a value is among the largest of its kind in ``maximum-window``."""
        if kind not in self._largest and len(self._largest) >= 10_000:
            self._largest.clear()
        recent = [one for one in self._largest.get(kind, ()) if one[1] > now - self._window]
        recent.append((value, now))
        recent.sort(reverse=True)
        self._largest[kind] = recent[: self._most]
        return (value, now) in self._largest[kind]


class _Children:
    """A span processor that notes which task spans are parents."""

    def __init__(self) -> None:
        #: Task spans that have not ended, by span id.
        self.open: dict[int, TaskSpan] = {}

    def on_start(self, span: Any, parent_context: Any = None) -> None:  # noqa: ARG002  # the SDK's
        parent = span.parent
        one = None if parent is None else self.open.get(parent.span_id)
        if one is not None:
            one.children = True

    def _on_ending(self, span: Any) -> None:
        """Do nothing."""

    def on_end(self, span: Any) -> None:
        """Do nothing."""

    def shutdown(self) -> None:
        """Do nothing."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:  # noqa: ARG002  # the SDK's
        """Do nothing."""
        return True


_watched: weakref.WeakKeyDictionary[TracerProvider, _Children] = weakref.WeakKeyDictionary()


def _children_of(provider: Any) -> _Children | None:
    """Return what watches a provider; None where it is not the SDK's, and cannot be watched."""
    if provider not in _watched:
        add = getattr(provider, "add_span_processor", None)
        if add is None:
            return None
        _watched[provider] = _Children()
        add(_watched[provider])
    return _watched[provider]


def _tell(span: Any, kind: str, message: str, traceback: str, when: int) -> None:
    """Tell an exception: by a log record where there is somebody for it, else by a span event."""
    about = {"exception.type": kind, "exception.message": message}
    if traceback:
        about["exception.stacktrace"] = traceback
    logged = _log(span, about, when)
    if not logged or "logs/dup" in os.environ.get(_OPT_IN, ""):
        span.add_event("exception", about, when)


def _log(span: Any, about: Mapping[str, str], when: int) -> bool:
    """Tell an exception by a log record; return whether an application has set where to."""
    if "opentelemetry._logs" not in sys.modules:  # whoever sets one has imported it
        return False
    from opentelemetry import _logs

    provider = _logs.get_logger_provider()
    if "Proxy" in type(provider).__name__ or "NoOp" in type(provider).__name__:
        return False
    try:
        record: Any = _logs.LogRecord(
            timestamp=when,
            context=set_span_in_context(span, Context()),
            severity_text="ERROR",
            severity_number=_logs.SeverityNumber.ERROR,
            attributes=about,
            event_name="exception",
        )
    except TypeError:  # an SDK from before records had a context
        return False
    provider.get_logger(SCOPE_NAME, __version__).emit(record)
    return True
