"""From the records of finished runs to tables, plots and one page. No model, no GPU."""

from muroan.report.html import build

__all__ = ["build"]
