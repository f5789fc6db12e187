"""What an adapter or covariances hold: a table, and a page with figures in one HTML file."""

from corda_kernels.report.content import (
    DAMPING,
    Report,
    adapter_report,
    covariance_report,
    describe_mixture,
    describe_ranks,
    with_covariances,
)
from corda_kernels.report.measure import measure_inputs, measure_spectra
from corda_kernels.report.page import check_matplotlib, html_page, write_page
from corda_kernels.report.table import Table, layer_table

__all__ = [
    "DAMPING",
    "Report",
    "Table",
    "adapter_report",
    "check_matplotlib",
    "covariance_report",
    "describe_mixture",
    "describe_ranks",
    "html_page",
    "layer_table",
    "measure_inputs",
    "measure_spectra",
    "with_covariances",
    "write_page",
]
