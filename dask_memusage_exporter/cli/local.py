"""The demo's cluster: worker processes of this machine, measured, that leave nothing behind.

Covers: starting and ending it quietly, running one task a file, the addresses of ``/metrics``.
Does not cover: a worker that dies; Dask starts it anew, and the task errs after a few attempts.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import dask.config
from distributed import Client, KilledWorker, LocalCluster, as_completed

# Not the built-in one before Python 3.11.
from distributed import TimeoutError as DaskTimeoutError
from distributed.system import MEMORY_LIMIT

from dask_memusage_exporter import nanny
from dask_memusage_exporter.cli import wordcount
from dask_memusage_exporter.cli.command import InputError
from dask_memusage_exporter.cli.texts import TextFile
from dask_memusage_exporter.config import Settings
from dask_memusage_exporter.install import install
from dask_memusage_exporter.records import TaskMemory
from dask_memusage_exporter.scheduler_agent import SchedulerAgent
from dask_memusage_exporter.worker import EXTENSION

#: In seconds; a machine that is busy starts many processes slowly.
START_TIMEOUT = 120
RESTART_TIMEOUT = 15

#: A worker gets its part of the machine's memory, but at least this much in bytes (or all): only
#: few tasks need much, and below it a task of the demo's own could end its worker.
LEAST_MEMORY = 2**30

_CONFIG: dict[str, Any] = {
    # The old format and the path on the command line, whatever a real cluster here writes.
    "memusage.csv.columns": "task",
    "memusage.csv.path": None,
    # Turned on by --threads.
    "memusage.jemalloc": False,
    # What preloads do for a real cluster has no place here.
    "distributed.scheduler.preload": [],
    "distributed.nanny.preload": [],
    # Nor its certificates: what is sent stays on this machine.
    "distributed.comm.require-encryption": False,
    "distributed.comm.default-scheme": "tcp",
    # A task that kills its worker should not take those with it that only wait there.
    "distributed.scheduler.worker-saturation": 1.0,
}


class Records(list[TaskMemory]):
    """Every record of a cluster, in order of arrival; a sink of the scheduler."""

    def write(self, record: TaskMemory) -> None:
        """Take one record."""
        self.append(record)

    def flush(self) -> None:
        """Do nothing: records can be seen at once."""

    def close(self) -> None:
        """Do nothing: the records stay."""


class Run(NamedTuple):
    """What a run has given."""

    #: The first record of each task that has finished.
    records: dict[str, TaskMemory]
    #: Why the others failed, by key.
    failed: dict[str, str]


class MeasuredCluster:
    """A running cluster. Made by :func:`measured_cluster`."""

    def __init__(
        self,
        cluster: LocalCluster,
        client: Client,
        csv_path: str,
        workers: int,
        threads: int,
        library: str | None,
    ) -> None:
        self._workers, self._threads = workers, threads
        scheduler: Any = cluster.scheduler
        self._scheduler = scheduler
        self._client = client
        self._records = Records()
        #: Why jemalloc is not turned on; None: it is, or one thread a worker needs none.
        self.no_jemalloc = _obstacle(library) if threads > 1 else None
        wanted = threads > 1 and self.no_jemalloc is None
        install(scheduler, csv_path, jemalloc=wanted and (library or True))
        self._agent: SchedulerAgent = scheduler.extensions[EXTENSION]
        # The workers know already that somebody listens: the CSV does.
        self._agent.add_sink(self._records)

    @property
    def rows_lost(self) -> int:
        """Rows that could not be written to the CSV."""
        return self._agent.health.dropped["csv_write"]

    def count_words(self, files: Sequence[TextFile], progress: Callable[[], None]) -> Run:
        """Run one task a file; call ``progress`` after each, whether it finished or failed."""
        # The number makes keys unique and keeps the order; the name tells what a row is about.
        keys = [f"calculate_top_10-{number:04d}-{file.name}" for number, file in enumerate(files)]
        jobs = list(zip(files, keys, strict=True))
        if self._threads > 1:
            # The longest first, so that the others run beside it.
            jobs.sort(key=lambda job: job[0].size, reverse=True)
        futures = self._client.map(
            wordcount.calculate_top_10, [f.path for f, _ in jobs], key=[key for _, key in jobs]
        )
        failed = {}
        for future in as_completed(futures, loop=self._client.loop):
            if future.status != "finished":
                failed[future.key] = _why(future.exception())
            progress()
        records: dict[str, TaskMemory] = {}
        for record in self._records:
            if record.status == "finished" and record.key not in failed:
                records.setdefault(str(record.key), record)
        return Run(records, failed)

    def metrics_urls(self) -> tuple[str, list[str]]:
        """Return the addresses of ``/metrics`` of the scheduler and of each worker."""
        with suppress(DaskTimeoutError):
            # One may have died of its task and is being started anew.
            self._client.wait_for_workers(self._workers, timeout=RESTART_TIMEOUT)
        ports = [
            worker.services["dashboard"]
            for worker in self._scheduler.workers.values()
            if "dashboard" in worker.services
        ]
        return _url(self._scheduler.http_server.port), [_url(port) for port in ports]


def _obstacle(library: str | None) -> str | None:
    source = Settings.load().source
    if source not in ("auto", "jemalloc"):
        return f"memusage.source is {source}"
    try:
        nanny.environment(library)
    except nanny.JemallocError as error:
        return str(error)
    return None


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}/metrics"


def _why(error: BaseException | None) -> str:
    if isinstance(error, KilledWorker):
        return (
            "its worker process was killed at each attempt, most likely for want of memory; fewer "
            "--workers, or a machine with more memory, give each more"
        )
    return f"{type(error).__name__}: {error}"


@contextmanager
def measured_cluster(
    *, workers: int, threads: int, csv_path: str, scratch: str
) -> Iterator[MeasuredCluster]:
    """Run a cluster of worker processes that is measured by us.

    Parameters
    ----------
    workers, threads
        Processes, and threads in each.
    csv_path
        Written in the old format.
    scratch
        A folder for what Dask writes: spilled data, locks.

    Raises
    ------
    InputError
        The CSV cannot be written, or the workers do not start.
    """
    jemalloc = Settings.load().jemalloc
    library = jemalloc if isinstance(jemalloc, str) else None
    with ExitStack() as stack:
        stack.enter_context(dask.config.set({**_CONFIG, "temporary-directory": scratch}))
        stack.enter_context(_quiet())
        # No workers yet: the constructor is over at once, and whatever interrupts their start
        # finds a cluster that is closed at the end of this block.
        cluster = stack.enter_context(
            LocalCluster(
                n_workers=0,
                threads_per_worker=threads,
                processes=True,
                memory_limit=max(MEMORY_LIMIT // workers, min(MEMORY_LIMIT, LEAST_MEMORY)),
                local_directory=scratch,
                dashboard_address="127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
                preload=[wordcount.__name__],
            )
        )
        client = stack.enter_context(Client(cluster, set_as_default=False))
        try:
            measured = MeasuredCluster(cluster, client, csv_path, workers, threads, library)
        except OSError as error:
            raise InputError(f"--csv: {csv_path!r}: {error.strerror}") from None
        try:
            _start_workers(cluster, workers)
            client.wait_for_workers(workers, timeout=START_TIMEOUT)
        except DaskTimeoutError:
            raise InputError(
                f"--workers: {workers} worker processes have not started within {START_TIMEOUT} s; "
                "give fewer"
            ) from None
        yield measured


def _start_workers(cluster: LocalCluster, workers: int) -> None:
    """Start the processes, deaf to what a terminal sends: Ctrl-C, and that it is closed.

    It sends that to them too, and they would die of it, of Ctrl-C with a traceback each. That a
    signal is ignored is inherited, so it is ignored here for the tenth of a second that it takes
    until all are there; from then on only we hear it, and end them as it is due. Those that Dask
    starts anew are told by ``wordcount.dask_setup``.
    """
    before = {one: signal.signal(one, signal.SIG_IGN) for one in wordcount.FROM_TERMINALS}
    try:
        cluster.scale(workers)
        end = time.monotonic() + START_TIMEOUT
        while len(multiprocessing.active_children()) < workers:
            if time.monotonic() > end:
                raise DaskTimeoutError
            time.sleep(0.01)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep distributed's log off the terminal, to the very end of the cluster."""
    handlers = [(one, one.level) for one in logging.getLogger("distributed").handlers]
    for handler, _ in handlers:
        handler.setLevel(logging.CRITICAL)
    ends = False
    try:
        yield
    except SystemExit:
        ends = True  # with threads of Dask's at work, perhaps, who should stay quiet
        raise
    finally:
        for handler, level in handlers if not ends else ():
            handler.setLevel(level)
