"""Grafana dashboards as code: ``python -m grafana`` writes everything that is generated.

Panels are plain data (``panels``), one small file a dashboard; one factory makes Grafana's JSON of
them. Both flavours, names as Prometheus scrapes them and as OTLP brings them, come from the same
data (``flavours``).

To add a panel: 1. a line in the dashboard's file, with a description that says how to read it and
what to do; 2. a metric of Dask's own that it needs goes into ``flavours.DASKS_OWN``; 3. run
``make dashboards``; 4. ``tests/test_dashboards_live.py`` asks its queries of a real Prometheus.
"""
