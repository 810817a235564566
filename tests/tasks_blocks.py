"""Tasks that read mapped files, and tasks of blocks: what they are made of, and how many bytes."""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.tasks import array


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


# -- blocks ------------------------------------------------------------------------------


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
