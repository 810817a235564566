"""`dask memusage demo`: a real job on a real cluster, and what each of its tasks needs in memory.

Covers: the call, the folder, the run, the report. The old tool's article told it of this job.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import click

from dask_memusage_exporter.cli import report, texts
from dask_memusage_exporter.cli.command import InputError, Verb, say
from dask_memusage_exporter.cli.local import measured_cluster
from dask_memusage_exporter.config import ConfigError, Settings

#: More would be a slip of the finger, and hard on the machine.
MOST_WORKERS = MOST_THREADS = 256


@click.command(cls=Verb)
@click.option(
    "--input",
    "folder",
    metavar="DIR",
    help="Count the words of the files in this folder and below; each is a task. Default: text "
    "made of this Python's own sources, one file of 25 MiB and 100 small ones.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, MOST_WORKERS),
    metavar="N",
    default=2,
    show_default=True,
    help="Worker processes.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    metavar="N",
    default=1,
    show_default=True,
    help="Threads in each. With more than one, tasks overlap, and jemalloc tells them apart.",
)
@click.option(
    "--csv",
    "csv_path",
    metavar="FILE",
    default="memusage.csv",
    show_default=True,
    help="Write one row a task in dask-memusage's format; overwritten if it is there.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document instead of the tables."
)
@click.option("--serve", is_flag=True, help="Stay up until Ctrl-C, so that /metrics can be read.")
def demo(
    *,
    folder: str | None,
    workers: int,
    threads: int,
    csv_path: str,
    as_json: bool,
    serve: bool,
) -> None:
    """Show what each task of a real job needs.

    The job counts the words of text files on a cluster of worker processes on this machine.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file's name may have letters that the terminal has not.
            stream.reconfigure(errors="backslashreplace")
    try:
        Settings.load()
    except ConfigError as error:
        raise InputError(f"{error} (a setting of Dask's configuration)") from None
    with _signals_raise(), _temporary_folder() as temporary:
        if folder is None:
            texts_folder = os.path.join(temporary, "texts")
            os.mkdir(texts_folder)
            texts.make(texts_folder)
        else:
            texts_folder = folder
        files = texts.find(texts_folder, csv_path)
        texts.check_csv(csv_path)
        began = time.monotonic()
        _note(f"Starting {workers} worker process{'' if workers == 1 else 'es'} ...")
        with measured_cluster(
            workers=workers, threads=threads, csv_path=csv_path, scratch=temporary
        ) as cluster:
            with click.progressbar(
                length=len(files),
                label="Counting words",
                show_pos=True,
                file=sys.stderr or io.StringIO(),
            ) as bar:
                run = cluster.count_words(files, lambda: bar.update(1))
            if not run.records:
                raise InputError(_nothing(run.failed))
            result = report.Report(
                folder=texts_folder,
                generated=folder is None,
                files=files,
                workers=workers,
                threads=threads,
                seconds=time.monotonic() - began,
                records=run.records,
                failed=run.failed,
                csv_path=os.path.abspath(csv_path),
                rows_lost=cluster.rows_lost,
                metrics=cluster.metrics_urls(),
                serves=serve,
                no_jemalloc=cluster.no_jemalloc,
            )
            say(report.as_json(result) if as_json else report.as_text(result))
            if serve:
                _serve()


def _note(text: str) -> None:
    click.echo(text, err=True)


def _nothing(failed: dict[str, str]) -> str:
    if not failed:
        return "no task was measured; see task_memory_errors_total on a worker's /metrics"
    key, why = next(iter(failed.items()))
    return f"all tasks failed; the first: {key}: {why}"


def _serve() -> None:
    with suppress(_Signalled):
        _note("Serving /metrics until Ctrl-C ...")
        while True:
            time.sleep(3600)


class _Signalled(SystemExit):
    """Somebody wants us to end; the status is the shell's own for it."""


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let signals that end us unwind the main thread, so that everything is closed and removed."""
    ends = False

    def end(number: int, _: FrameType | None) -> NoReturn:
        nonlocal ends
        ends = True
        # Once: closing takes seconds, and if it is interrupted itself something stays behind.
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        with suppress(OSError):
            os.write(2, b"\nEnding ...\n")  # and no stream: one may be in use just now
        raise _Signalled(128 + number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items() if not ends else ():
            signal.signal(number, handler)


@contextmanager
def _temporary_folder() -> Iterator[str]:
    try:
        folder = tempfile.TemporaryDirectory(
            prefix="dask-memusage-demo-", ignore_cleanup_errors=True
        )
    except OSError as error:
        raise InputError(
            f"a temporary folder cannot be made ({error.strerror}); set TMPDIR to a folder that "
            "you may write to"
        ) from None
    with folder as path:
        yield path
