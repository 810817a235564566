"""The span of one execution: what is noted of it until it ends.

Covers: what a bracket has of its span: taken off its thread, told what was raised, finished.
Does not cover: how the SDK's span is started (``span_starter``), made, ended and left out
(``spans``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import Token
from time import time_ns
from typing import TYPE_CHECKING, Any

from dask.typing import Key
from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import Span

from dask_memusage_exporter.failures import Failure
from dask_memusage_exporter.records import TaskMemory

if TYPE_CHECKING:
    from dask_memusage_exporter.spans import Spans

#: What hears that the span of a record is kept: the record, its trace's id and its own.
Kept = Callable[[TaskMemory, int, int], object]

NOTHING: Mapping[str, Any] = {}


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
            None if task is None else task.annotations or NOTHING
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
