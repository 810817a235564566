"""The demo's job, as in the article that introduced dask-memusage. Worker processes import this."""

from __future__ import annotations

import signal
from collections import Counter

#: What a terminal sends to all processes that were started on it.
FROM_TERMINALS = (signal.SIGINT, signal.SIGHUP)


def calculate_top_10(path: str) -> list[tuple[str, int]]:
    """Return the 10 most frequent words of a text file and how often each occurs.

    Naive on purpose: the whole text and the list of all its words are in memory at once, which
    for a file of 25 MiB takes several hundred MiB.

    Parameters
    ----------
    path
        Read as UTF-8; what is none is replaced, so that any file is text.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    words = text.split()
    return Counter(words).most_common(10)


def dask_setup(_: object) -> None:
    """Leave Ctrl-C, and a terminal's end, to the demo's main process; as a preload of the workers.

    A terminal sends both to the workers too, which would die of it.
    """
    for one in FROM_TERMINALS:
        signal.signal(one, signal.SIG_IGN)
