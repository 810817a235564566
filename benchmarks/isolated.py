"""The other end of :func:`harness.isolated`: ``python -m benchmarks.isolated FILE``.

Reads ``[module, function, arguments]`` from standard input, writes the result to FILE.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    module, function, arguments = json.load(sys.stdin)
    result = getattr(importlib.import_module(module), function)(**arguments)
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
