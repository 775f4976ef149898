"""Reports on what would be quantised, and on what was."""

from __future__ import annotations

from lopro_fx.report.backend import BackendReport, backend_report
from lopro_fx.report.explain import Explanation, explain
from lopro_fx.report.report import Report, report

__all__ = ["BackendReport", "Explanation", "Report", "backend_report", "explain", "report"]
