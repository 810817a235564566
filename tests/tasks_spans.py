"""Tasks that an instrumented library runs in: what span is current, and what they start."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from distributed import get_client, get_worker

from tests.tasks import fail, is_open


def current_span() -> tuple[int, int]:
    """Return trace and span id of what is current on this thread; zeros: nothing is."""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return context.trace_id, context.span_id


def tells_its_span() -> str:
    """Say something on the current span, as instrumented code does; return its id."""
    from opentelemetry import trace

    span = trace.get_current_span()
    assert span.is_recording()
    span.set_attribute("rows", 7)
    span.add_event("read")
    span.update_name("told")
    return trace.format_span_id(span.get_span_context().span_id)


def ends_its_span() -> None:
    from opentelemetry import trace

    trace.get_current_span().end()


def current_in_fork() -> tuple[str, str]:
    """Return the current span's id, as a forked child has it and as it is here."""
    from opentelemetry import trace

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, trace.format_span_id(current_span()[1]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    with open(read, "rb") as pipe:
        os.close(write)
        return pipe.read().decode(), trace.format_span_id(current_span()[1])


def starts_child(name: str) -> None:
    """Do what an instrumented library does."""
    from opentelemetry import trace

    with trace.get_tracer("library").start_as_current_span(name):
        pass


def raises_name() -> None:
    """Raise with the name of a file that is no UTF-8, as Python has it."""
    raise ValueError("no rows in /data/" + os.fsdecode(b"\xff"))


class OnlyHere(Exception):
    """Says what it is where it was raised; unpickled it ends whoever asks."""

    def __str__(self) -> str:
        if self.args == ("unpickled",):
            raise SystemExit
        return "on purpose"

    def __reduce__(self) -> Any:
        return OnlyHere, ("unpickled",)


def raises_only_here() -> None:
    raise OnlyHere("on purpose")


def submits_failing(key: str, there: str) -> None:
    """Have another task run on a worker that fails, as part of this one's trace."""
    from dask_memusage_exporter import traced

    with traced():
        get_client().submit(fail, 1, key=key, workers=there).exception()


def annotations(*_: Any) -> dict[str, Any]:
    """Return what the task that runs here is annotated with."""
    worker = get_worker()
    return dict(worker.state.tasks[worker.get_current_task()].annotations)


async def starts_child_on_loop(name: str) -> None:
    starts_child(name)


async def current_in_coroutine(path: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return what is current before and after others have had their turn on the event loop."""
    before = current_span()
    while not is_open(path):
        await asyncio.sleep(0.01)
    await asyncio.gather(inner := asyncio.ensure_future(current_later()))
    assert inner.result() == before
    return before, current_span()


async def current_later() -> tuple[int, int]:
    await asyncio.sleep(0)
    return current_span()


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


def leaves_context() -> None:
    """Make a span current, and never take it off."""
    from opentelemetry import context, trace

    foreign = trace.NonRecordingSpan(trace.SpanContext(7, 7, is_remote=True))
    context.attach(trace.set_span_in_context(foreign))


class Spanned:
    """An actor that is instrumented."""

    def on_thread(self, name: str) -> tuple[int, int]:
        starts_child(name)
        return current_span()

    def raises(self) -> None:
        raise ValueError("on purpose")

    def raises_after(self, seconds: float) -> None:
        time.sleep(seconds)
        raise ValueError("on purpose")

    def raises_in_a_row(self, text: str) -> None:
        self.row = [*getattr(self, "row", []), text]
        raise ValueError(text)

    def in_a_row(self) -> list[str]:
        """Return in what order that was called: not always as a client calls."""
        return self.row

    def current(self) -> tuple[int, int]:
        return current_span()

    async def on_loop(self, name: str) -> tuple[int, int]:
        starts_child(name)
        return current_span()
