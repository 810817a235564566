"""Benchmarks: what the exporter sees and what it costs, beside no exporter and dask-memusage 1.1.

``python -m benchmarks [NAME ...] [--quick] [--json FILE] [--markdown FILE]``

To add one: 1. a module with a function ``run(quick: bool) -> Result`` (see ``report``), 2. its
name in ``__main__.BENCHMARKS``. What it measures runs in :func:`harness.isolated`: a process of
its own, with a cluster of its own, whose workers are processes.
"""
