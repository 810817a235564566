"""``python -m benchmarks``: run benchmarks, show their tables, write JSON and Markdown."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import report

#: In the order in which they run; each is a module here.
BENCHMARKS = (
    "accuracy",
    "kinds",
    "threads",
    "bracket",
    "spans",
    "throughput",
    "allocators",
    "idle",
    "completeness",
    "memory",
    "scopes",
    "scale",
    "quantiles",
    "kills",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="smoke size: figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")

    facts = report.machine()
    names = [name for name in BENCHMARKS if not arguments.names or name in arguments.names]
    results = []
    for result in run(names, quick=arguments.quick):
        results.append(result)
        print(report.text(result), flush=True)
        # After each one: what was found is kept if a later one fails.
        if arguments.json:
            found = report.document(results, facts, quick=arguments.quick)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        if arguments.markdown:
            arguments.markdown.write_text(report.markdown(results, facts, quick=arguments.quick))
    return 0


def run(names: Sequence[str], *, quick: bool) -> Iterator[report.Result]:
    """Run benchmarks and return their results in order, as they come.

    One after the other; the quick ones, whose figures mean nothing, several at a time.
    """

    def one(name: str) -> report.Result:
        began = time.monotonic()
        result: report.Result = importlib.import_module(f"benchmarks.{name}").run(quick)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return result

    with ThreadPoolExecutor(4 if quick else 1) as pool:
        yield from pool.map(one, names)


if __name__ == "__main__":
    raise SystemExit(main())
