"""A report of one or more runs: one HTML file that opens without a network."""

from lightning_nc.extras import needed

with needed("a report", '"lightning-neural-collapse[report]"'):
    import matplotlib  # noqa: F401

from lightning_nc.report.page import report, write_report

__all__ = ["report", "write_report"]
