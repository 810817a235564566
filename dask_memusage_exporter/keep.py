"""Which spans are kept, once it is known what was measured: those that stand out, and parents.

Covers: the settings ``memusage.spans.keep``; which task spans have children, by a look at every
span that starts through a provider of the SDK's, and at what tasks submit (``submission``).
Does not cover: other children in other processes that were not started through a span here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.trace import SpanContext

from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.failures import Failure
from dask_memusage_exporter.measure.scopes import FLOOR_BYTES, SHARE
from dask_memusage_exporter.per_provider import PerProvider
from dask_memusage_exporter.records import TaskMemory

if TYPE_CHECKING:
    from dask_memusage_exporter.task_span import TaskSpan


class Keep:
    """Which spans are kept once it is known what was measured: all, or those that stand out."""

    def __init__(self, settings: Settings) -> None:
        self._peak, self._growth = settings.spans_keep_peak, settings.spans_keep_growth
        self._most, self._window = settings.spans_keep_largest, settings.maximum_window
        #: Whether any are left out.
        self.some = bool(self._peak or self._growth or self._most)
        #: Whether that depends on those that came before.
        self.compares = bool(self._most)
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
        if len(recent) == self._most:
            # A process grows a little with each task. Were that enough, hardly any were left out.
            smallest = min(recent)
            if value - smallest[0] <= max(FLOOR_BYTES, SHARE * smallest[0]):
                self._largest[kind] = recent
                return False
            recent.remove(smallest)
        self._largest[kind] = [*recent, (value, now)]
        return True


class Children:
    """A span processor that notes which task spans are parents."""

    def __init__(self) -> None:
        #: Task spans that have not ended, by span id.
        self.open: dict[int, TaskSpan] = {}

    def on_start(self, span: Any, parent_context: Any = None) -> None:  # noqa: ARG002  # the SDK's
        """Note its parent, where that is a task's span."""
        self.note(getattr(span, "parent", None))

    def note(self, parent: SpanContext | None) -> None:
        """Note that a span has a child, where it is a task's."""
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


_watches: PerProvider[Children] = PerProvider()


def note_parent(parent: SpanContext) -> None:
    """Note that a span has children, or links to it, that may be in other processes."""
    for watch in _watches.all():
        watch.note(parent)


def children_of(provider: Any) -> Children | None:
    """Return what watches a provider; None where it is not the SDK's, and cannot be watched."""
    add = getattr(provider, "add_span_processor", None)
    if add is None:
        return None

    def watch() -> Children:
        children = Children()
        add(children)
        return children

    try:
        return _watches.get(provider, watch)
    except TypeError:  # it cannot be remembered
        return None
