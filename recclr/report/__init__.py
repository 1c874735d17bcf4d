"""report.html of a run: one page that needs nothing but itself."""

from recclr.report.page import write_report

__all__ = ["write_report"]
