"""Tasks that tests run on workers; imported there, so this module must stay light."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Reschedule, get_client, get_worker, rejoin, secede, worker_client

MIB = 2**20


def array(mib: int = 100, hold: float = 0.0) -> None:
    """Hold one array for a while."""
    block = np.ones(mib * MIB // 8)
    time.sleep(hold)
    del block


def made(mib: int) -> np.ndarray:
    """Return an array."""
    return np.ones(mib * MIB // 8)


def nothing(*_: Any) -> None:
    """Do nothing, whatever the inputs are."""


def sleep(seconds: float) -> None:
    time.sleep(seconds)


class Gate:
    """A file that tasks wait for, in any process: they block on its lock, and use no processor."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._file = open(self.path, "w")  # noqa: SIM115
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        """Let everybody through, now and later."""
        self._file.close()

    @property
    def reached(self) -> bool:
        """Whether a task has come to it."""
        return os.path.exists(self.path + ".reached")


def is_open(path: str) -> bool:
    """Return whether a gate is open."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def reach(path: str) -> None:
    """Say that a task has come to a gate."""
    Path(path + ".reached").touch()


def wait_for(path: str, *_: Any) -> None:
    """Wait at a gate."""
    reach(path)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def hold_until(path: str, mib: int) -> None:
    """Hold an array until a gate opens."""
    block = np.ones(mib * MIB // 8)
    wait_for(path)
    del block


def counted_hold_until(path: str, mib: int) -> None:
    """The same, counting its executions in a file."""
    times_before(path + ".executions")
    hold_until(path, mib)


def busy_until(path: str) -> None:
    """Use the processor and next to no memory until a gate opens."""
    reach(path)
    while not is_open(path):
        sum(range(1000))


def array_after(path: str, mib: int) -> np.ndarray:
    """Return an array that is made once a gate opens."""
    wait_for(path)
    return np.ones(mib * MIB // 8)


def fail(mib: int = 100) -> None:
    array(mib)
    raise ValueError("on purpose")


def times_before(path: str) -> int:
    """Return how often this was called before; counts in a file."""
    with open(path, "a+") as file:
        file.write("x")
        return file.tell() - 1


def fail_twice(path: str, mib: int = 100) -> None:
    array(mib)
    if times_before(path) < 2:
        raise ValueError("on purpose")


def reschedule_once(path: str, mib: int = 100) -> None:
    array(mib)
    if times_before(path) < 1:
        raise Reschedule


def secede_and_rejoin(first: int, second: int) -> None:
    """Hold one array before seceding, and another after it."""
    array(first)
    secede()
    array(second, 0.02)
    rejoin()


def secede_until(path: str) -> None:
    """Leave the pool and do not end until a gate opens."""
    secede()
    wait_for(path)


def with_worker_client(count: int, mib: int) -> None:
    with worker_client() as client:
        client.gather(client.map(array, [mib] * count, key="inner", pure=False))


def with_get_client(count: int, mib: int) -> None:
    client = get_client()
    client.gather(client.map(array, [mib] * count, key="inner", pure=False))


async def coroutine(mib: int, path: str | None = None, *, error: bool = False) -> None:
    """Await, hold an array over another await, perhaps fail."""
    await asyncio.sleep(0)
    block = np.ones(mib * MIB // 8)
    while path is not None and not is_open(path):
        await asyncio.sleep(0.005)
    del block
    if error:
        raise ValueError("on purpose")


class Actor:
    """Methods of every kind."""

    def hold(self, path: str, mib: int = 0) -> None:
        hold_until(path, mib)

    def fail(self, mib: int) -> None:
        fail(mib)

    async def on_loop(self, mib: int) -> None:
        array(mib)


#: A program that holds memory for a while: bytes, seconds.
HOLD = """
import sys, time
block = bytearray(int(sys.argv[1]))
for offset in range(0, len(block), 4096):
    block[offset] = 1
time.sleep(float(sys.argv[2]))
"""


def child_holds(mib: int, seconds: float) -> None:
    subprocess.run([sys.executable, "-c", HOLD, str(mib * MIB), str(seconds)], check=True)


def short_child(mib: int) -> None:
    """Run a program that lives for a millisecond or two, and hold an array."""
    subprocess.run(["/bin/true"], check=True)
    array(mib)


def unwaited_child(mib: int) -> int:
    """Start a program, do not wait for it, and hold an array."""
    child = os.spawnl(os.P_NOWAIT, "/bin/true", "true")
    array(mib)
    return child


def wait_for_child(child: int) -> None:
    os.waitpid(child, 0)


def fork_holds(mib: int, seconds: float) -> None:
    """Fork with multiprocessing; the child touches memory of its own."""
    import multiprocessing

    child = multiprocessing.get_context("fork").Process(target=array, args=(mib, seconds))
    child.start()
    child.join()
    assert child.exitcode == 0


def bare_fork(seconds: float) -> int:
    """Fork with nothing around it; the child lives for a while. Return its exit status."""
    child = os.fork()
    if child == 0:
        time.sleep(seconds)
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def open_executor(dask_worker: Any) -> None:
    """Give a worker an executor of one forked process."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    fork = multiprocessing.get_context("fork")
    dask_worker.executors["processes"] = ProcessPoolExecutor(1, mp_context=fork)


def close_executor(dask_worker: Any) -> None:
    dask_worker.executors.pop("processes").shutdown()


#: A pool of one process, kept by a worker from task to task, and what that process keeps.
_pool: list[Any] = []
_kept: list[np.ndarray] = []


def open_pool(mib: int) -> None:
    """Start the pool, let its process hold an array for a while and let it go."""
    import multiprocessing

    _pool.append(multiprocessing.get_context("fork").Pool(1))
    _pool[0].apply(array, (mib, 0.1))
    time.sleep(0.1)


def beside_pool(mine: int, its: int, *, keeps: bool = False) -> None:
    """Hold an array, and have one made in the pool; its process may keep that."""
    block = np.ones(mine * MIB // 8)
    _pool[0].apply(keep if keeps else array, (its,))
    del block


def keep(mib: int) -> None:
    _kept.append(made(mib))


def close_pool() -> None:
    pool = _pool.pop()
    pool.terminate()
    pool.join()


def fork_and_look(mib: int) -> dict[str, Any]:
    """Fork, let the child look at what it has of us, hold an array; return what it has seen."""
    import json

    from prometheus_client import REGISTRY, generate_latest

    from dask_memusage_exporter import process

    def look() -> dict[str, Any]:
        links = []
        for name in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{name}"))
            except OSError:  # the descriptor of the listing itself
                continue
        tracker = process._process.tracker
        return {
            "ours_open": [
                link for link in links if link.endswith(("clear_refs", "statm", "vmstat"))
            ],
            "starts": tracker.start(None, lambda: True) is not None,
            "exports": "task_memory" in generate_latest(REGISTRY).decode(),
        }

    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(into, json.dumps(look()).encode())
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    array(mib)
    seen = json.loads(os.read(out, 65536))
    for descriptor in (out, into):
        os.close(descriptor)
    return {**seen, "exit": os.waitstatus_to_exitcode(status)}


def in_c(mib: int) -> None:
    """Allocate in one call that holds the GIL all the time."""
    block = b"x" * (mib * MIB)
    del block


def arrays(count: int, mib: int) -> list[np.ndarray]:
    return [np.ones(mib * MIB // 8) for _ in range(count)]


def lazily(count: int, mib: int) -> Iterator[np.ndarray]:
    """Return a generator: nothing is allocated before somebody takes from it."""
    return (np.ones(mib * MIB // 8) for _ in range(count))


def taken(blocks: Iterator[np.ndarray]) -> int:
    """Hold all that a generator gives."""
    return len(list(blocks))


def leave() -> None:
    raise SystemExit(3)


def read_mapped(path: str) -> int:
    """Read a file through a read-only mapping, more than 20 ms long."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        return sum(sum(mapped[i : i + 65536]) for i in range(0, len(mapped), 2**20)) + _touch(
            mapped
        )


def _touch(mapped: Any) -> int:
    return sum(mapped[i] for i in range(0, len(mapped), 4096))


def read_memmap(path: str) -> int:
    return int(np.memmap(path, mode="r", dtype="u1").sum(dtype="u8"))


def largest_of_memmap(path: str) -> int:
    """Read a file through a read-only mapping in a few milliseconds."""
    return int(np.memmap(path, mode="r", dtype="u1").max())


def memmap_and_array(path: str, mib: int) -> int:
    """Read a file so, use the processor for a while, and hold an array."""
    largest = largest_of_memmap(path)
    end = time.thread_time() + 0.2
    while time.thread_time() < end:
        sum(range(1000))
    array(mib)
    return largest


# -- kinds of blocks: what they are made of, and how many bytes that is ------------------


def filled(count: int, make: Callable[[int], Any]) -> list[Any]:
    """Return a list of so many objects that did not grow: growing leaves holes of its own."""
    blocks = [None] * count
    for i in range(count):
        blocks[i] = make(i)
    return blocks


def byte_blocks(size: int, total: int) -> list[bytearray]:
    return filled(total // size, lambda _: bytearray(size))


def integers(total: int) -> list[int]:
    return filled(total // 40, lambda i: 10**6 + i)


def strings(total: int) -> list[str]:
    return filled(total // 120, lambda i: f"{i:051d}")


def dicts(total: int) -> list[dict[str, int]]:
    return filled(total // 272, lambda i: {"a": 10**6 + i, "b": -1000 - i})


def size_of(blocks: list[Any]) -> int:
    """Return the bytes of a list of equal blocks, in units of 16 as every allocator here gives."""
    one = blocks[0]
    parts = [one, *one.values()] if isinstance(one, dict) else [one]
    each = sum(-(-sys.getsizeof(part) // 16) * 16 for part in parts)
    return sys.getsizeof(blocks) + len(blocks) * each


def frame(total: int) -> Any:
    import pandas as pd

    return pd.DataFrame(np.ones((total // 32, 4)), columns=list("abcd"), copy=False)


KINDS: dict[str, Any] = {
    "5 kB": lambda total: byte_blocks(5000, total),
    "64 kB": lambda total: byte_blocks(64_000, total),
    "1 MB": lambda total: byte_blocks(2**20, total),
    "integers": integers,
    "strings": strings,
    "dicts": dicts,
}


def allocate(kind: str, total: int) -> int:
    """Allocate blocks of a kind, let them go, return what they were."""
    blocks = KINDS[kind](total)
    return size_of(blocks)


def allocate_and_keep(size: int, total: int) -> np.ndarray:
    """Allocate arrays, let them go but for one, and return that."""
    blocks = [np.ones(size // 8) for _ in range(total // size)]
    return blocks[len(blocks) // 2]


def sized(kind: str, total: int) -> int:
    """Hold blocks of a kind (an array and a DataFrame too) for a while; return what they were."""
    if kind == "array":
        block = np.ones(total // 8)
        size = block.nbytes
    elif kind == "frame":
        block = frame(total)
        size = int(block.memory_usage().sum())
    else:
        block = KINDS[kind](total)
        size = size_of(block)
    time.sleep(0.05)
    return size


def secede_only(*_: Any) -> None:
    """Leave the pool: another thread takes the place of this one, which ends."""
    secede()


def opentelemetry_modules() -> list[str]:
    """Return what is loaded of OpenTelemetry."""
    return sorted(name for name in sys.modules if name.startswith("opentelemetry"))


def set_own_providers(endpoint: str) -> None:
    """What an application does that exports itself."""
    from opentelemetry import metrics
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource

    exporter = OTLPMetricExporter(endpoint=f"{endpoint}/v1/metrics")
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=300)
    about = {"service.name": "application", "service.instance.id": str(os.getpid())}
    resource = Resource.create(about)
    metrics.set_meter_provider(MeterProvider([reader], resource=resource))


def add_own(dask_worker: Any) -> bool:
    """Use the application's provider once more; return whether it still takes anything."""
    from opentelemetry import metrics

    provider = metrics.get_meter_provider()
    provider.get_meter("application").create_counter("own").add(1)
    return not provider._shutdown


def current_span() -> tuple[int, int]:
    """Return trace and span id of what is current on this thread; zeros: nothing is."""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return context.trace_id, context.span_id


def starts_child(name: str) -> None:
    """Do what an instrumented library does."""
    from opentelemetry import trace

    with trace.get_tracer("library").start_as_current_span(name):
        pass


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


class Heard:
    """A span processor of an application's that keeps books on starts and ends."""

    def __init__(self) -> None:
        self.open: dict[int, str] = {}
        #: Of those that have ended, whether they are sampled and the peak that they tell.
        self.ended: list[tuple[str, bool, Any]] = []

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.open[span.context.span_id] = span.name

    def _on_ending(self, span: Any) -> None:
        pass

    def on_end(self, span: Any) -> None:
        del self.open[span.context.span_id]
        peak = span.attributes.get("dask.task.memory.peak")
        self.ended.append((span.name, span.context.trace_flags.sampled, peak))

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


HEARD = Heard()


def hear() -> None:
    """Add it to the provider that is set."""
    from opentelemetry import trace

    trace.get_tracer_provider().add_span_processor(HEARD)


def heard() -> tuple[list[str], list[tuple[str, bool, Any]]]:
    return list(HEARD.open.values()), list(HEARD.ended)


def set_foreign_tracer() -> None:
    """Set a TracerProvider that is not the SDK's and has nothing but what the API asks for."""
    from opentelemetry import trace

    class Foreign(trace.Span):
        __slots__ = ("about",)

        def __init__(self, about: dict[str, Any]) -> None:
            self.about = about
            FOREIGN.append(about)

        def get_span_context(self) -> Any:
            return trace.SpanContext(7, id(self), False)

        def set_attributes(self, attributes: Any) -> None:
            self.about.update(attributes)

        def set_attribute(self, key: str, value: Any) -> None:
            self.about[key] = value

        def end(self, end_time: Any = None) -> None:
            self.about["ended"] = True

        def is_recording(self) -> bool:
            return True

        def add_event(self, *_: Any, **__: Any) -> None:
            self.about["event"] = True

        def update_name(self, name: str) -> None:
            pass

        def set_status(self, *_: Any, **__: Any) -> None:
            pass

        def record_exception(self, *_: Any, **__: Any) -> None:
            pass

    class Tracer(trace.Tracer):
        def start_span(self, name: str, *_: Any, **__: Any) -> Any:
            return Foreign({"name": name})

        def start_as_current_span(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    class Provider(trace.TracerProvider):
        __slots__ = ()
        __hash__ = None

        def get_tracer(self, *_: Any, **__: Any) -> Any:
            return Tracer()

    trace.set_tracer_provider(Provider())


#: What such spans have been told.
FOREIGN: list[dict[str, Any]] = []


def foreign() -> list[dict[str, Any]]:
    return FOREIGN


def set_empty_logger() -> None:
    """Set a LoggerProvider without processors, as OTEL_LOGS_EXPORTER=none does."""
    from opentelemetry import _logs
    from opentelemetry.sdk._logs import LoggerProvider

    _logs.set_logger_provider(LoggerProvider())


def set_own_tracer(endpoint: str, delay: float = 0.0, log: bool = False) -> None:
    """Set a TracerProvider as an application does; its processor may hold up who ends a span."""
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter

    class Slow(SpanExporter):
        def export(self, spans: Any) -> Any:
            time.sleep(delay)

        def shutdown(self) -> None:
            pass

    provider = TracerProvider(resource=Resource.create({"service.name": "application"}))
    if delay:
        provider.add_span_processor(SimpleSpanProcessor(Slow()))
    trace.set_tracer_provider(provider)
    add_processor(endpoint)
    if log:
        set_own_logger()


def add_processor(endpoint: str) -> None:
    """Have the provider that is set send its spans."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=100)
    trace.get_tracer_provider().add_span_processor(processor)


#: Log records that an application's own LoggerProvider has been given: name and attributes.
LOGGED: list[tuple[str, dict[str, Any], int]] = []


def set_own_logger() -> None:
    """Set a LoggerProvider as an application does."""
    from opentelemetry import _logs
    from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor

    class Keeping(LogRecordProcessor):
        def on_emit(self, log_record: Any) -> None:
            record = log_record.log_record
            LOGGED.append((record.event_name, dict(record.attributes), record.span_id))

        emit = on_emit  # its name in older SDKs

        def shutdown(self) -> None:
            pass

        def force_flush(self, timeout_millis: int = 0) -> bool:
            return True

    provider = LoggerProvider()
    provider.add_log_record_processor(Keeping())
    _logs.set_logger_provider(provider)


def logged() -> list[tuple[str, dict[str, Any], int]]:
    return LOGGED


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
