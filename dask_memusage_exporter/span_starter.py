"""How the SDK's span of a task is started: its name, its parent, its links, and when it began.

Covers: W3C's ``traceparent`` and ``tracestate`` among a task's annotations, links to such a span.
Does not cover: who puts them there (``submission``); when and where it is started (``spans``).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    Tracer,
    TracerProvider,
    get_current_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dask_memusage_exporter import __version__
from dask_memusage_exporter.aggregate import OVERFLOW, Aggregate, to_label
from dask_memusage_exporter.submission import LINK
from dask_memusage_exporter.task_span import NOTHING, TaskSpan

SCOPE_NAME = "dask_memusage_exporter"

#: Name of spans of prefixes that have no label of their own: names must be few.
UNNAMED = "dask.task"

PREFIX_NAME = "dask.task.prefix.name"

#: Parents whose context is remembered: one a submission, and few are under way at once.
_MOST_PARENTS = 100

#: Prefixes whose spans' names are remembered; a label that one has or has not stays so.
_MOST_NAMES = 1_000

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


class SpanStarter:
    """Starts the SDK's spans of tasks.

    Parameters
    ----------
    guest
        Whether the provider is an application's.
    """

    def __init__(self, provider: TracerProvider, *, guest: bool, aggregate: Aggregate) -> None:
        self._tracer: Tracer = provider.get_tracer(SCOPE_NAME, __version__)
        self._aggregate = aggregate
        #: Whether the SDK's span is made before its task, with what is known then: an application's
        #: processors may look at both, and other samplers than the standard ones.
        self.early = guest or os.environ.get("OTEL_TRACES_SAMPLER", "") not in _SAMPLERS
        self._names: dict[str, tuple[str, str]] = {}
        self._parents: OrderedDict[tuple[str, str], Context] = OrderedDict()

    def start(self, one: TaskSpan) -> Span:
        """Start the SDK's span of a task, as of when that began. On any thread."""
        annotations = one.annotations or NOTHING
        name, label = self._names.get(one.prefix) or self._name(one.prefix)
        return self._tracer.start_span(
            name,
            self._parent(annotations, "traceparent"),
            SpanKind.CONSUMER,
            {PREFIX_NAME: label} if self.early else None,  # all else at the end
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
