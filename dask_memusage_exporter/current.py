"""A task's current span, which is made when somebody first asks for it.

Most tasks have no instrumentation of their own: between their start and their end nobody looks.
Then the span can wait for a thread of ours, and a task's own thread only notes that there is one.

Covers: whatever asks by OpenTelemetry's API, in any thread or coroutine to which the context has
been handed on, and in a forked child of the thread on which it is current.
Does not cover: who goes through a context as a plain dict, by a key of its span's that is not
public; a child that is forked elsewhere, by whom no span of its parent's can be made any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Span, get_current_span, set_span_in_context


class LazyContext(Context):
    """A context whose span is made at the first look into it.

    The API looks by ``get`` (``get_value``) and ``copy`` (``set_value``), and by nothing else. But
    what takes a context, the SDK's own metrics among it, writes ``context or get_current()``: so it
    is not empty.

    Parameters
    ----------
    make
        Returns the span, the same one each time; called on whatever thread looks, never raises.
    """

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[], Span]) -> None:
        super().__init__()
        self._make: Callable[[], Span] | None = make

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, as a dict does."""
        self._fill()
        return super().get(key, default)

    def copy(self) -> dict[str, object]:
        """Return all that is in it, as a dict does."""
        self._fill()
        return super().copy()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()

    def _fill(self) -> None:
        make = self._make
        if make is not None:
            # A context is not to be changed; nobody has seen it without its span.
            dict.update(self, set_span_in_context(make(), Context()))
            self._make = None


def _before_fork() -> None:
    """Have the span made that is current: in a forked child it would be another one."""
    get_current_span()


os.register_at_fork(before=_before_fork)
