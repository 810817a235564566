"""Pictures of the dashboards for the docs: ``make pictures``.

Covers: a real run (``job``, ``run``), and each dashboard's JSON drawn with its data by Grafana's
own libraries, in a browser (``src``, ``draw``).
Does not cover: a Grafana server, which is not here. What is drawn by us in place of a panel that
Grafana's libraries have not is said on the picture.
"""
