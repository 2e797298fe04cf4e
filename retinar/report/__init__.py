"""What ``retinar evaluate --report DIR`` writes: one page to read anywhere, its figures as JSON and pictures, and a
blinded reading for human graders."""

from retinar.report.folder import check_report_folder
from retinar.report.writer import write_report

__all__ = ["check_report_folder", "write_report"]
