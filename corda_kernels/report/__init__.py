"""A page on an adapter or on covariances: figures, verdicts and a table, in one HTML file."""

from corda_kernels.report.content import Report
from corda_kernels.report.drawing import check_matplotlib
from corda_kernels.report.gather import DAMPING, adapter_report, covariance_report, with_covariances
from corda_kernels.report.measure import measure_inputs, measure_spectra
from corda_kernels.report.page import html_page, write_page

__all__ = [
    "DAMPING",
    "Report",
    "adapter_report",
    "check_matplotlib",
    "covariance_report",
    "html_page",
    "measure_inputs",
    "measure_spectra",
    "with_covariances",
    "write_page",
]
