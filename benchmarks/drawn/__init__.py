"""The drawn report: Markdown, plots and one page from the JSON of the benchmarks. Installed as ``pairtile.report``.

It reads files alone: it knows neither the kernels nor the suites, and needs matplotlib and jinja2 (``pairtile[report]``).
"""

from .page import write_report
from .results import ReportError

__all__ = ["ReportError", "write_report"]
