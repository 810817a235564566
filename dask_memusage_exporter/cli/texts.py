"""The demo's input: the text files of a folder, and a folder of its own making.

Covers: finding and checking them before any work starts.
Does not cover: a file that vanishes or fails later; then its task errs.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

from dask_memusage_exporter.cli.command import InputError
from dask_memusage_exporter.config import MIB
from dask_memusage_exporter.exporters.csv_file import TASK_COLUMNS

#: Size in bytes of the one large file that :func:`make` writes, the size in the article.
LARGE_BYTES = 25 * MIB
LARGE_NAME = "whole_library.txt"

#: How many small files stand beside it, and the largest of them in bytes.
SMALL_FILES = 100
SMALL_BYTES = 64 * 1024


class TextFile(NamedTuple):
    """One input file, one task."""

    path: str
    #: Relative to the folder, and fit to be shown: no control characters, no undecodable bytes.
    name: str
    #: In bytes, when it was found.
    size: int


def make(folder: str) -> None:
    """Write a folder of real text: this Python's own sources.

    One file of 25 MiB (the sources one after another, repeated) beside 100 small ones. The large
    one comes last in the order of names, so that the small ones meet heaps that it has not warmed.

    Raises
    ------
    InputError
        This Python has no sources, or they cannot be written.
    """
    library = sysconfig.get_path("stdlib")
    try:
        written = _write(folder, library)
    except OSError as error:
        raise InputError(
            f"the demo's own text cannot be written to {folder!r} ({error.strerror}); set TMPDIR "
            "to a folder with 30 MB of room, or give a folder of text by --input"
        ) from None
    if not written:
        raise InputError(
            f"this Python has no sources in {library!r} to make text of; give a folder of text "
            "by --input"
        )


def _write(folder: str, library: str) -> int:
    """Write the files and return the size of the large one in bytes."""
    small = written = 0
    with open(os.path.join(folder, LARGE_NAME), "wb") as large:
        while written < LARGE_BYTES:
            before = written
            for path in _sources(library):
                try:
                    with open(path, "rb") as file:
                        text = file.read()
                except OSError:
                    continue
                if small < SMALL_FILES and 0 < len(text) <= SMALL_BYTES:
                    small += 1
                    copy = os.path.join(folder, "modules", os.path.relpath(path, library))
                    os.makedirs(os.path.dirname(copy), exist_ok=True)
                    with open(copy, "wb") as file:
                        file.write(text)
                written += large.write(text[: LARGE_BYTES - written])
                if written == LARGE_BYTES:
                    break
            small = SMALL_FILES  # what comes now are repetitions
            if written == before:
                break
    return written


def _sources(library: str) -> Iterator[str]:
    for where, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages"})
        for name in sorted(names):
            if name.endswith(".py"):
                yield os.path.join(where, name)


def find(folder: str, csv_path: str) -> list[TextFile]:
    """Return the regular files of a folder and all below it, in the order of their names.

    Parameters
    ----------
    folder
        Links to folders are not followed; links to files are.
    csv_path
        The demo's own output, which is no input where an earlier run has left it here.

    Raises
    ------
    InputError
        The folder is missing, none, empty, or something in it cannot be read; or ``csv_path``
        would overwrite one of the files.
    """
    if not folder:
        raise InputError("--input: '' is not a folder; give a folder of text files")
    if not os.path.lexists(folder):
        raise InputError(f"--input: there is no folder {folder!r}; give one that exists")
    if not os.path.isdir(folder):
        raise InputError(f"--input: {folder!r} is not a folder; give the folder that it is in")
    unreadable: list[OSError] = []
    files = []
    for where, _, names in os.walk(folder, onerror=unreadable.append):
        for path in (os.path.join(where, name) for name in names):
            try:
                # Not a pipe, say, which would wait for ever.
                if not os.path.isfile(path) or _is_own_csv(path, csv_path):
                    continue
                with open(path, "rb"):
                    size = os.path.getsize(path)
            except OSError as error:
                unreadable.append(error)
            else:
                files.append(TextFile(path, shown(os.path.relpath(path, folder)), size))
    if unreadable:
        first = unreadable[0]
        more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise InputError(
            f"--input: cannot read {first.filename!r}{more} ({first.strerror}); make it readable "
            "or give another folder"
        )
    if not files:
        raise InputError(f"--input: there are no files in {folder!r}; give a folder of text files")
    return sorted(files, key=lambda file: file.path)


def _is_own_csv(path: str, csv_path: str) -> bool:
    try:
        if not os.path.samefile(path, csv_path):
            return False
    except OSError:  # no CSV yet
        return False
    with open(path, "rb") as file:
        if file.read(1024).startswith(",".join(TASK_COLUMNS).encode()):
            return True
    raise InputError(
        f"--csv: {csv_path!r} is one of the files of --input and would be overwritten; give "
        "another path"
    )


def check_csv(path: str) -> None:
    """Check that a CSV can be written, and change nothing.

    Raises
    ------
    InputError
        It cannot.
    """
    existed = os.path.lexists(path)
    try:
        # O_NONBLOCK: a pipe that nobody reads is an error here, and would wait for ever later.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666))
        if not existed:
            os.unlink(path)
    except OSError as error:
        raise InputError(
            f"--csv: {path!r} cannot be written ({error.strerror}); give a path in a folder that "
            "exists and that you may write to"
        ) from None


def shown(name: str) -> str:
    """Return a path as it can be printed: no undecodable bytes, no control characters."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in text)
