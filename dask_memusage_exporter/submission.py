"""The client's side of a trace: the current span travels with what is submitted.

The tasks of a computation become children of the span that is current when it is submitted, by a
W3C ``traceparent`` among the annotations that distributed sends beside the graph, so that no
optimization and no fusion loses them.

Covers: everything that a client submits; Dask's own spans (``distributed.span``) as real ones.
Does not cover: what a task submits, but where the worker's process is instrumented itself.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import dask
from distributed import Client, spans

from dask_memusage_exporter import __version__

logger = logging.getLogger("distributed.client.memusage")

#: W3C's own name, that of the parent.
_PARENT = "traceparent"
#: The annotation that makes a task's span the root of its own trace, linked to the current span.
LINK = "memusage-link"

#: Loaded where tasks have spans, of which some may be left out.
_KEEP = "dask_memusage_exporter.keep"

#: Whether the instrumentor is on; the annotation that a block of :func:`traced` gives, if any.
_always = False
_traced: ContextVar[str | None] = ContextVar("memusage-traced", default=None)

#: What was there before it was wrapped.
_originals: dict[str, Any] = {}
_lock = threading.Lock()

# Untyped, and a method of the class is replaced.
_dask: Any = dask
_Client: Any = Client


@contextmanager
def traced(name: str | None = None, *, link: bool = False) -> Iterator[None]:
    """Make tasks that are submitted in this block children of the span that is current then.

    For a client without an instrumentor (see :mod:`dask_memusage_exporter.instrumentor`). Dask's
    own spans (``distributed.span``) in the block are real ones, and parents too.

    Parameters
    ----------
    name
        Start a span of this name around the block; None: the application's own spans are enough.
    link
        Link the tasks to that span instead, each in a trace of its own: where it lasts for days, as
        a service's does, one trace would never end.

    Examples
    --------
    >>> with tracer.start_as_current_span("nightly"), traced():  # doctest: +SKIP
    ...     ddf.compute()
    """
    _wrap()
    token = _traced.set(LINK if link else _PARENT)
    try:
        with ExitStack() as stack:
            if name is not None:
                stack.enter_context(_tracer().start_as_current_span(name))
            yield
    finally:
        _traced.reset(token)


def carrier(name: str = _PARENT) -> dict[str, str]:
    """Return the annotations that make the current span the parent; empty where there is none.

    Parameters
    ----------
    name
        Of the annotation, :data:`LINK` to be linked instead.
    """
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    annotations: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(annotations)
    if annotations and (keep := sys.modules.get(_KEEP)) is not None:  # in a task: it is a parent
        keep.note_parent(get_current_span().get_span_context())
    if name != _PARENT and _PARENT in annotations:
        return {name: annotations[_PARENT]}
    return annotations


def wrap() -> None:
    """Do it for everything that this process submits from now on; harmless twice."""
    global _always
    _always = True
    _wrap()


def unwrap() -> None:
    """Leave distributed as it was."""
    global _always
    _always = False
    with _lock:
        if "span" in _originals:
            _behind_span().cell_contents = _originals.pop("span")
        if "submit" in _originals:
            _Client._graph_to_futures = _originals.pop("submit")


def _wrap() -> None:
    with _lock:
        if "submit" not in _originals:
            _originals["submit"] = _Client._graph_to_futures
            _Client._graph_to_futures = _with_parent(_originals["submit"])
        if "span" not in _originals:
            try:
                behind = _behind_span()
            except (AttributeError, ValueError):
                logger.warning(
                    "dask-memusage: Dask's own spans have no real ones in this version of "
                    "distributed; tasks have their parents all the same"
                )
            else:
                _originals["span"] = behind.cell_contents
                behind.cell_contents = _with_real(behind.cell_contents)


def _behind_span() -> Any:
    """Return where ``distributed.span``, a context manager, has the generator that it runs.

    There and not under its name: programs import it by name before anybody wraps it.
    """
    helper: Any = spans.span
    return helper.__closure__[helper.__code__.co_freevars.index("func")]


def _with_parent(submit: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the one method by which a client submits anything; there is no public place for it."""

    @functools.wraps(submit)
    def with_parent(self: Client, *args: Any, **kwargs: Any) -> Any:
        annotations, how = {}, _traced.get() or (_PARENT if _always else None)
        if how is not None and _PARENT not in _dask.get_annotations():
            try:
                annotations = carrier(how)
            except Exception as error:  # a provider's own: what is submitted comes first
                logger.warning("dask-memusage: tasks have no parent span (%s)", error)
        with _dask.annotate(**annotations):
            return submit(self, *args, **kwargs)

    return with_parent


def _with_real(original: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    """Return the generator of ``distributed.span`` with a real span around it for each tag."""

    @functools.wraps(original)
    def span(*tags: str) -> Iterator[str]:
        with ExitStack() as stack:
            # First: it has its own word for tags that are none.
            span_id = stack.enter_context(contextmanager(original)(*tags))
            if _always or _traced.get() is not None:
                tracer, real = _tracer(), None
                for tag in tags:
                    real = stack.enter_context(tracer.start_as_current_span(tag))
                if real is not None:
                    real.set_attribute("dask.span.id", span_id)
            yield span_id

    return span


def _tracer() -> Any:
    from opentelemetry.trace import get_tracer

    return get_tracer("dask_memusage_exporter", __version__)
